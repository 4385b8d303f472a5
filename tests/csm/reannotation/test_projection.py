from pathlib import Path

import polars as pl
import pytest
import torch

from csm import tables
from csm.encoders import FeatureTable
from csm.errors import InputError
from csm.reannotation import Annotator, AnnotatorSpec, FitInputs
from csm.reannotation.projection import fit_projection, load_projection


def write_features(directory: Path, features: torch.Tensor, labels: torch.Tensor, split: str = "train") -> FitInputs:
    """A table of one part; the class means are those of ``split``, other rows would move them."""
    other = {"train": "val", "val": "train"}[split]
    schema = tables.features(features.shape[1])
    frame = pl.DataFrame(
        {
            "image_id": range(2 * len(labels)),
            "split": [split] * len(labels) + [other] * len(labels),
            "label": [*labels.tolist(), *labels.tolist()],
            "feature": torch.cat([features, features + 7]).numpy(),
        },
        schema=schema,
    )
    tables.write(frame, directory / "part-00000000.parquet", schema)
    return FitInputs(FeatureTable(directory), int(labels.max()) + 1, tuple("abcdef"[: int(labels.max()) + 1]))


def draw(rows: int, size: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def test_the_annotation_by_hand(tmp_path: Path) -> None:
    """((f - p_b) . (p_a - p_b)) / ||p_a - p_b||^2 of features as they are, with the training images' class means."""
    real, labels = draw(12), torch.arange(12) % 3
    fit_projection(tmp_path / "fitted", write_features(tmp_path, real, labels))
    annotator = Annotator(AnnotatorSpec("paper", "projection", tmp_path / "fitted", "encoder"))
    features, class_a, class_b = draw(4, seed=1), torch.tensor([0, 0, 1, 0]), torch.tensor([1, 2, 2, 1])
    share, posterior = annotator.annotate({"encoder": features}, class_a, class_b, torch.full((4,), 0.5))
    assert posterior is None
    assert annotator.log_posterior({"encoder": features}) is None
    means = [real[labels == label].double().mean(dim=0) for label in range(3)]
    for row in range(4):
        a, b = means[class_a[row]], means[class_b[row]]
        expected = (features[row].double() - b) @ (a - b) / ((a - b) @ (a - b))
        assert share[row].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_the_prototypes_themselves_are_the_ends_of_the_line(tmp_path: Path) -> None:
    fit_projection(tmp_path / "fitted", write_features(tmp_path, draw(12), torch.arange(12) % 3))
    head = load_projection(tmp_path / "fitted")
    class_a, class_b = torch.tensor([0, 2]), torch.tensor([1, 1])
    for features, end in ((head.prototypes[class_a], 1.0), (head.prototypes[class_b], 0.0)):
        assert torch.allclose(head.share(features, class_a, class_b, torch.zeros(2)), torch.tensor([end, end]), atol=1e-6)


def test_a_class_without_image_is_named(tmp_path: Path) -> None:
    inputs = write_features(tmp_path, draw(6), torch.tensor([0, 1, 0, 1, 3, 3]))
    with pytest.raises(InputError, match="class 2 has no training image"):
        fit_projection(tmp_path / "fitted", inputs)


def test_missing_prototypes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prototypes.safetensors does not exist"):
        load_projection(tmp_path / "nowhere")
