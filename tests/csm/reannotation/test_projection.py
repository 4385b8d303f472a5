from pathlib import Path

import pytest
import torch

from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.errors import InputError
from csm.reannotation.projection import Projection, fit_projection, load_projection


@pytest.fixture
def member(tmp_path: Path) -> tuple[Classifier, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.5,), (0.2,))).eval()
    classifier.save(tmp_path / "member")
    return classifier, tmp_path / "member"


def images(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 1, 6, 6), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_the_annotation_by_hand(tmp_path: Path, member: tuple[Classifier, Path]) -> None:
    classifier, folder = member
    real, labels = images(12), torch.arange(12) % 3
    # Of several members the first is the encoder.
    annotator = fit_projection(tmp_path / "annotator", [folder, tmp_path / "absent"], real, labels, 3)
    class_a, class_b = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 2, 2, 1])
    share, posterior = annotator(images(4, seed=1), class_a, class_b)
    assert posterior is None
    assert annotator.log_posterior(images(4)) is None
    with torch.no_grad():
        f, mixed = classifier.features(real).double(), classifier.features(images(4, seed=1)).double()
    means = [f[labels == label].mean(dim=0) for label in range(3)]
    for row in range(4):
        p1, p2 = means[class_a[row]], means[class_b[row]]
        expected = (mixed[row] - p2) @ (p1 - p2) / ((p1 - p2) @ (p1 - p2))
        assert share[row].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)


def test_a_loaded_annotator_is_the_fitted_one(tmp_path: Path, member: tuple[Classifier, Path]) -> None:
    fitted = fit_projection(tmp_path, [member[1]], images(600), torch.arange(600) % 3, 3)  # more than a batch
    loaded = load_projection(tmp_path, [member[1]])
    assert isinstance(loaded, Projection)
    assert torch.equal(loaded.prototypes, fitted.prototypes)
    arguments = (images(5, 2), torch.tensor([0] * 5), torch.tensor([2] * 5))
    assert torch.equal(loaded(*arguments)[0], fitted(*arguments)[0])


def test_a_class_without_image_is_named(tmp_path: Path, member: tuple[Classifier, Path]) -> None:
    with pytest.raises(InputError, match="class 2 has no training image"):
        fit_projection(tmp_path, [member[1]], images(6), torch.arange(6) % 2, 3)


def test_missing_prototypes_are_named(tmp_path: Path, member: tuple[Classifier, Path]) -> None:
    with pytest.raises(InputError, match=r"prototypes.safetensors does not exist"):
        load_projection(tmp_path / "nowhere", [member[1]])
