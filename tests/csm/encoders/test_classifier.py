from pathlib import Path

import numpy as np
import pytest
import torch

from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.encoders import ENCODERS, Sources
from csm.encoders.classifier import VIEWS, Teacher, load_penultimate, load_teacher
from csm.errors import InputError


def member(seed: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.5,), (0.2,)))
        torch.nn.init.normal_(classifier.network.head.weight, std=3.0)
        return classifier.eval().requires_grad_(False)


def images(rows: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 1, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def sources(tmp_path: Path, members: int) -> Sources:
    for seed in range(members):
        member(seed).save(tmp_path / str(seed))
    return Sources(tmp_path / "own", members=tuple(tmp_path / str(seed) for seed in range(members)))


def test_the_first_classifier_encodes_by_its_penultimate_layer(tmp_path: Path) -> None:
    features = load_penultimate(sources(tmp_path, 2))(images())
    assert features.shape == (6, 8)
    assert torch.allclose(member(0).network.head(features), member(0)(images()), atol=1e-6)


def test_a_missing_classifier_is_named(tmp_path: Path) -> None:
    for name in ("classifier", "teacher"):
        with pytest.raises(InputError, match=r"absent/model.json does not exist"):
            ENCODERS[name].load(Sources(tmp_path, members=(tmp_path / "absent",)))


@pytest.mark.parametrize("members", [1, 3])
def test_the_teacher_is_the_mean_of_the_members(tmp_path: Path, members: int) -> None:
    found = load_teacher(sources(tmp_path, members))(images())
    probs = [member(seed)(images()).double().softmax(dim=1) for seed in range(members)]
    assert torch.allclose(found.double(), (sum(probs) / members).log(), atol=1e-5)
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(6), atol=1e-5)
    if members > 1:
        assert (probs[0] - probs[1]).abs().max() > 0.01


def moved(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Pixel by pixel, down and right; black where nothing comes from."""
    result = np.zeros_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            if 0 <= row - rows < image.shape[1] and 0 <= column - columns < image.shape[2]:
                result[:, row, column] = image[:, row - rows, column - columns]
    return result


@pytest.mark.parametrize(
    ("views", "allowed"), [(1, lambda r, c: r == c == 0), (5, lambda r, c: abs(r) + abs(c) <= 1), (9, lambda r, c: True)]
)
def test_views_are_all_shifts_by_one_pixel(tmp_path: Path, views: int, allowed: object) -> None:
    found = load_teacher(sources(tmp_path, 2), views)(images())
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if allowed(row, column)]
    assert len(shifts) == views
    total = torch.zeros(6, 3, dtype=torch.float64)
    for seed in (0, 1):
        for rows, columns in shifts:
            view = torch.from_numpy(np.stack([moved(image, rows, columns) for image in images().numpy()]))
            total += member(seed)(view).double().softmax(dim=1)
    assert torch.allclose(found.double(), (total / (2 * views)).log(), atol=1e-5)


def test_other_numbers_of_views_are_refused(tmp_path: Path) -> None:
    assert VIEWS == (1, 5, 9)
    for views in (0, 2, 10):
        with pytest.raises(InputError, match=f"views: expected 1, 5, 9, got {views}"):
            load_teacher(Sources(tmp_path), views)


def test_members_that_are_certain_of_different_classes_share_the_mass() -> None:
    def certain(label: int) -> Classifier:
        classifier = member(0)
        torch.nn.init.zeros_(classifier.network.head.weight)
        classifier.network.head.bias.copy_(torch.eye(3)[label] * 500)
        return classifier

    posterior = Teacher([certain(0), certain(1)])(images()).exp()
    assert torch.allclose(posterior, torch.tensor([0.5, 0.5, 0.0]).expand(6, 3), atol=1e-6)
