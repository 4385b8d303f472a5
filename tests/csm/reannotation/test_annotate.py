from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest
import torch

from csm import tables
from csm.encoders import Encoder, Sources
from csm.encoders.pixels import load_pixels
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.reannotation import Annotator, AnnotatorSpec, Calibration, annotate, fit_ensemble, soft_labels

SHAPE = (1, 4, 1)
CLASSES = 4


class Reader:
    """Annotates with what is written in the pixels and in the pair it is told."""

    def __init__(self, posterior: bool, encoder: str = "cells") -> None:
        self.posterior = posterior
        self.spec = AnnotatorSpec("reader", "", Path(), encoder)

    def annotate(
        self, features: Mapping[str, torch.Tensor], class_a: torch.Tensor, class_b: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cells = features[self.spec.encoder or ""]  # class_a, class_b, group, step
        assert cells[:, 0].tolist() == class_a.tolist()
        assert cells[:, 1].tolist() == class_b.tolist()
        assert (cells[:, 3] / 2).tolist() == lam.tolist()
        return cells[:, 2] + cells[:, 3] / 100, cells if self.posterior else None


class Cells:
    """The pixels as numbers; counts the images that it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1).float()

    def to(self, device: torch.device) -> "Cells":
        return self


def read(
    plan: pl.DataFrame, mixed: pl.DataFrame, reader: Reader, shape: tuple[int, int, int] = SHAPE, n_classes: int = CLASSES
) -> pl.DataFrame:
    return annotate(plan, mixed, {"reader": reader}, {"cells": Cells()}, shape, n_classes)["reader"]  # type: ignore[dict-item]


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
    frame = read(plan.sample(fraction=1.0, shuffle=True, seed=1), images, Reader(posterior))
    assert tables.check(frame, tables.annotations(CLASSES)) is frame
    assert frame["mix_id"].to_list() == images["mix_id"].to_list()
    rows = {row["mix_id"]: row for row in plan.rows(named=True)}
    for row in frame.rows(named=True):
        planned = rows[row["mix_id"]]
        assert row["lam_raw"] == pytest.approx(planned["group"] + planned["step"] / 100)
        expected = [planned[name] for name in ("class_a", "class_b", "group", "step")] if posterior else None
        assert row["log_posterior"] == expected


def test_each_image_goes_through_each_encoder_once(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    encoders: dict[str, Encoder] = {"one": Cells(), "two": Cells(), "unused": Cells()}
    readers = {name: Reader(False, encoder) for name, encoder in [("a", "one"), ("b", "two"), ("c", "one")]}
    frames = annotate(plan, mixed, readers, encoders, SHAPE, CLASSES)  # type: ignore[arg-type]
    assert [encoder.seen for encoder in encoders.values()] == [len(mixed), len(mixed), 0]  # type: ignore[attr-defined]
    assert frames["a"].equals(frames["c"])


def test_the_ratio_needs_no_image(plan: pl.DataFrame, mixed: pl.DataFrame, tmp_path: Path) -> None:
    ratio = Annotator(AnnotatorSpec("ratio", "ratio", tmp_path))
    frame = annotate(plan, mixed.select("mix_id"), {"ratio": ratio}, {}, SHAPE, CLASSES)["ratio"]
    assert frame["lam_raw"].equals(plan["lam"], check_names=False)
    assert frame["log_posterior"].null_count() == len(plan)


def test_a_posterior_gives_the_share_of_the_pair(plan: pl.DataFrame, mixed: pl.DataFrame, tmp_path: Path) -> None:
    """By the head "posterior" on the four pixels as scores."""
    annotator = Annotator(AnnotatorSpec("pixels", "posterior", tmp_path, "pixels"))
    frame = annotate(plan, mixed, {"pixels": annotator}, {"pixels": load_pixels(Sources(tmp_path))}, SHAPE, CLASSES)["pixels"]
    for cells, planned, row in zip(mixed["image"], plan.rows(named=True), frame.rows(named=True), strict=True):
        scores = (torch.tensor(list(cells), dtype=torch.float64) / 127.5 - 1).softmax(dim=0)
        a, b = scores[planned["class_a"]], scores[planned["class_b"]]
        assert row["lam_raw"] == pytest.approx(float(a / (a + b)), abs=1e-6)
        assert row["log_posterior"] == pytest.approx(scores.log().tolist(), abs=1e-6)


def test_an_annotator_of_other_classes_is_refused(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    with pytest.raises(InputError, match="annotator reader knows 4 classes, the data has 5: fit it again"):
        read(plan, mixed, Reader(True), n_classes=5)


def test_an_image_of_another_plan_is_refused(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    foreign = mixed.with_columns(mix_id=pl.when(pl.col("mix_id") == mixed["mix_id"][3]).then(pl.lit("7_0_1")).otherwise("mix_id"))
    with pytest.raises(InputError, match="a mixed image is not in the plan"):
        read(plan, foreign, Reader(True))


def test_an_id_that_begins_alike_is_another_id(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    longer = mixed.with_columns(mix_id=pl.col("mix_id") + "0")
    with pytest.raises(InputError, match="a mixed image is not in the plan"):
        read(plan, longer, Reader(True))


def test_images_of_another_size_are_refused(plan: pl.DataFrame, mixed: pl.DataFrame) -> None:
    with pytest.raises(InputError, match="expected 5 per image"):
        read(plan, mixed, Reader(True), shape=(1, 5, 1))


def test_of_an_ensemble_what_is_kept_is_of_the_pooled_posterior(plan: pl.DataFrame, mixed: pl.DataFrame, tmp_path: Path) -> None:
    """The most probable class of each member is not enough to know that of the pool."""
    member = AnnotatorSpec("pixels", "posterior", tmp_path, "pixels")
    uniform = torch.full((6, CLASSES), 1 / CLASSES).log()
    calibrations = {"a": Calibration("temperature", temperature=0.02), "b": Calibration("none")}
    fit_ensemble(tmp_path / "pool", dict.fromkeys(calibrations, uniform), calibrations, torch.zeros(6, dtype=torch.int64))
    annotator = Annotator(AnnotatorSpec("pool", "ensemble", tmp_path / "pool", None, (member, member)))
    encoders = {"pixels": load_pixels(Sources(tmp_path))}
    whole, kept = (annotate(plan, mixed, {"pool": annotator}, encoders, SHAPE, CLASSES, top=top)["pool"] for top in (None, 2))
    tables.check(kept, tables.annotations(CLASSES, 2))
    assert kept["lam_raw"].equals(whole["lam_raw"])
    for row, stored in zip(whole.rows(named=True), kept.rows(named=True), strict=True):
        ranked = sorted(range(CLASSES), key=lambda k: -row["log_posterior"][k])
        probs = torch.tensor(row["log_posterior"], dtype=torch.float64).exp()
        assert stored["log_posterior"] == pytest.approx([row["log_posterior"][k] for k in ranked[:2]])
        assert probs[stored["classes"]].tolist() == pytest.approx(probs[ranked[:2]].tolist())
        assert stored["log_rest"] == pytest.approx(float(probs[ranked[2:]].sum().log()), abs=1e-5)
    labels = soft_labels(plan, kept, CLASSES, Calibration("none"))["soft_label"].to_numpy()
    assert labels.sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_an_annotator_of_pairs_keeps_its_share_alone(plan: pl.DataFrame, mixed: pl.DataFrame, tmp_path: Path) -> None:
    ratio = Annotator(AnnotatorSpec("ratio", "ratio", tmp_path))
    frame = annotate(plan, mixed.select("mix_id"), {"ratio": ratio}, {}, SHAPE, CLASSES, top=2)["ratio"]
    assert tables.check(frame, tables.annotations(CLASSES, 2)) is frame
    assert frame.select("classes", "log_posterior", "log_rest").null_count().row(0) == (len(plan),) * 3
