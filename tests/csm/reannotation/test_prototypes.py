from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from csm.errors import InputError
from csm.reannotation.heads import FitInputs
from csm.reannotation.projection import fit_projection
from csm.reannotation.prototypes import check_distinct, class_prototypes, project


def features(rows: int, seed: int = 0, size: int = 6) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def test_projection_is_the_formula_of_the_paper() -> None:
    f, a, b = features(20), features(20, 1), features(20, 2)
    found = project(f, a, b)
    for row in range(20):
        x, p1, p2 = (tensor[row].double().numpy() for tensor in (f, a, b))
        assert found[row].item() == pytest.approx(np.dot(x - p2, p1 - p2) / np.linalg.norm(p1 - p2) ** 2, rel=1e-4, abs=1e-5)
    assert found.min() < 0  # not clipped


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.25, 1.0, 2.0])
def test_a_point_of_the_line_is_found_whatever_lies_across_it(share: float) -> None:
    a, b = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    across = torch.tensor([[0.0, 5.0, -3.0]])
    assert project(b + share * (a - b) + across, a, b).item() == pytest.approx(share, abs=1e-6)


def test_swapping_the_classes_gives_the_other_share() -> None:
    f, a, b = features(10), features(10, 1), features(10, 2)
    assert torch.allclose(project(f, a, b), 1 - project(f, b, a), atol=1e-5)


def test_coinciding_prototypes_are_refused() -> None:
    a, b = features(3, 1), features(3, 2)
    b[1] = a[1]
    with pytest.raises(InputError, match="prototypes of two classes coincide"):
        project(features(3), a, b)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_prototype_is_the_mean_of_its_class(size: int) -> None:
    f, labels = features(60), torch.arange(60) % 3
    batches = zip(f.split(size), labels.split(size), strict=True)
    prototypes = class_prototypes(batches, 3)
    assert prototypes.dtype == torch.float32
    for label in range(3):
        expected = f.double().numpy()[labels.numpy() == label].mean(axis=0)
        assert prototypes[label].numpy() == pytest.approx(expected, abs=1e-6)


def test_many_images_do_not_lose_digits() -> None:
    f = torch.full((3000, 1), 1000.1)  # a float32 sum of these is off by more than one unit of the mean's last digits
    assert class_prototypes(((f, torch.zeros(3000, dtype=torch.int64)) for _ in range(20)), 1).item() == pytest.approx(
        float(f[0]), rel=1e-7
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_refused(bad: float) -> None:
    f = features(4)
    f[2, 3] = bad
    with pytest.raises(InputError, match="a feature of a real image is not finite"):
        class_prototypes([(f, torch.tensor([0, 1, 0, 1]))], 2)


def test_a_class_without_image_is_named() -> None:
    with pytest.raises(InputError, match="class 1 has no training image"):
        class_prototypes([(features(4), torch.tensor([0, 2, 0, 2]))], 3)
    with pytest.raises(InputError, match="class 2 has no training image"):
        class_prototypes([(features(4), torch.tensor([0, 1, 0, 1]))], 3)


def test_no_images_at_all() -> None:
    with pytest.raises(InputError, match="class 0 has no training image"):
        class_prototypes([], 2)


def test_classes_whose_prototypes_coincide_are_named() -> None:
    prototypes = features(5)
    check_distinct(prototypes)
    prototypes[3] = prototypes[1]
    with pytest.raises(InputError, match="the prototypes of classes 1 and 3 coincide: the encoder does not tell them apart"):
        check_distinct(prototypes)


def test_prototypes_as_near_as_float32_can_tell_are_distinct() -> None:
    prototypes = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 2**-22]])
    check_distinct(prototypes)
    assert project(prototypes, prototypes[[0, 0]], prototypes[[1, 1]]).tolist() == [1.0, 0.0]


def test_prototypes_whose_distance_is_no_number_of_float32_coincide() -> None:
    prototypes = torch.tensor([[0.0, 1.0], [1e-30, 1.0]])  # the square of the distance is 0
    with pytest.raises(InputError, match="classes 0 and 1 coincide"):
        check_distinct(prototypes)
    with pytest.raises(InputError, match="coincide"):
        project(prototypes, prototypes[[0, 0]], prototypes[[1, 1]])


def test_a_fit_names_classes_that_the_encoder_does_not_tell_apart(tmp_path: Path, fit_inputs: Callable[..., FitInputs]) -> None:
    f, labels = features(60), torch.arange(60) % 3
    f[labels == 2] = f[labels == 0]
    with pytest.raises(InputError, match="classes 0 and 2 coincide"):
        fit_projection(tmp_path, fit_inputs((f, labels)))
