from pathlib import Path

import polars as pl
import pytest
import torch

from csm import storage, tables
from csm.encoders import Encoder
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Annotator, AnnotatorSpec, annotate


class Corners:
    """The first two pixels."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :2].float()

    def to(self, device: torch.device) -> Encoder:
        return self


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("head", ["projection", "lda"])
def test_an_annotator_that_says_no_number_is_named(tmp_path: Path, head: str, bad: float) -> None:
    if head == "projection":
        storage.write_tensors(tmp_path / "prototypes.safetensors", {"prototypes": torch.tensor([[0.0, 1.0], [bad, 0.0]])})
    else:
        tensors = {
            "center": torch.zeros(2),
            "weight": torch.eye(2),
            "bias": torch.tensor([bad, 0.0]),
            "shrinkage": torch.tensor(0.1),
        }
        storage.write_tensors(tmp_path / "lda.safetensors", tensors)
    plan = make_plan(2, "data", "net", PlanConfig(ratios=3, sets_per_pair=2))
    mixed = plan.select("mix_id", tables.from_images(torch.full((6, 1, 2, 2), 7, dtype=torch.uint8)))
    annotators = {"mine": Annotator(AnnotatorSpec("mine", head, tmp_path, "corners"))}
    with pytest.raises(InputError, match="annotator mine: what it says of an image is no number"):
        annotate(plan, mixed, annotators, {"corners": Corners()}, (2, 2, 1), 2)


def test_no_image_is_annotated_twice_or_not_at_all(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "prototypes.safetensors", {"prototypes": torch.tensor([[10.0, 0.0], [0.0, 0.0]])})
    plan = make_plan(2, "data", "net", PlanConfig(ratios=3, sets_per_pair=2))
    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 1, 2)
    mixed = plan.select("mix_id", tables.from_images(pixels)).sample(fraction=1.0, shuffle=True, seed=1)
    annotators = {"mine": Annotator(AnnotatorSpec("mine", "projection", tmp_path, "corners"))}
    frame = annotate(plan, mixed, annotators, {"corners": Corners()}, (1, 2, 1), 2)["mine"]
    assert frame["mix_id"].to_list() == mixed["mix_id"].to_list()
    expected = pl.Series([image[0] / 10 for image in mixed["image"]], dtype=pl.Float32)
    assert frame["lam_raw"].to_list() == pytest.approx(expected.to_list())
