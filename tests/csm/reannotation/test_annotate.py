import polars as pl
import pytest
import torch

from csm import tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.reannotation import ANNOTATORS, annotate

SHAPE = (1, 4, 1)
CLASSES = 4


class Reader:
    """Annotates with what is written in the pixels and in the pair it is told."""

    def __init__(self, posterior: bool) -> None:
        self.posterior = posterior

    def __call__(
        self, images: torch.Tensor, class_a: torch.Tensor, class_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cells = images.flatten(1).double()  # class_a, class_b, group, step
        assert cells[:, 0].tolist() == class_a.tolist()
        assert cells[:, 1].tolist() == class_b.tolist()
        return cells[:, 2] + cells[:, 3] / 100, cells if self.posterior else None

    def log_posterior(self, images: torch.Tensor) -> torch.Tensor | None:
        return None


@pytest.fixture
def plan() -> pl.DataFrame:
    return make_plan(CLASSES, "data", "net", PlanConfig(ratios=3, sets_per_pair=2))


@pytest.fixture
def mixed(plan: pl.DataFrame) -> pl.DataFrame:
    cells = [bytes(row) for row in plan.select("class_a", "class_b", "group", "step").iter_rows()]
    return plan.select("mix_id").with_columns(pl.Series("image", cells, dtype=pl.Binary))


@pytest.mark.parametrize("posterior", [True, False])
def test_every_row_has_its_own_annotation_in_the_order_of_the_images(
    plan: pl.DataFrame, mixed: pl.DataFrame, posterior: bool
) -> None:
    images = mixed.sample(20, shuffle=True, seed=2)  # some of the plan, in another order
    frame = annotate(plan.sample(fraction=1.0, shuffle=True, seed=1), images, Reader(posterior), SHAPE, CLASSES)
    assert tables.check(frame, tables.annotations(CLASSES)) is frame
    assert frame["mix_id"].to_list() == images["mix_id"].to_list()
    rows = {row["mix_id"]: row for row in plan.rows(named=True)}
    for row in frame.rows(named=True):
        planned = rows[row["mix_id"]]
        assert row["lam_raw"] == pytest.approx(planned["group"] + planned["step"] / 100)
        expected = [planned[name] for name in ("class_a", "class_b", "group", "step")] if posterior else None
        assert row["log_posterior"] == expected


def test_an_image_of_another_plan_is_refused(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    foreign = mixed.with_columns(mix_id=pl.when(pl.col("mix_id") == mixed["mix_id"][3]).then(pl.lit("7_0_1")).otherwise("mix_id"))
    with pytest.raises(InputError, match="a mixed image is not in the plan"):
        annotate(plan, foreign, Reader(True), SHAPE, CLASSES)


def test_an_id_that_begins_alike_is_another_id(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    longer = mixed.with_columns(mix_id=pl.col("mix_id") + "0")
    with pytest.raises(InputError, match="a mixed image is not in the plan"):
        annotate(plan, longer, Reader(True), SHAPE, CLASSES)


def test_images_of_another_size_are_refused(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    with pytest.raises(InputError, match="expected 5 per image"):
        annotate(plan, mixed, Reader(True), (1, 5, 1), CLASSES)


def test_the_registry_holds_the_paper_and_the_teacher() -> None:
    assert {"projection", "teacher"} <= set(ANNOTATORS)
