from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.datasets.real import build
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.training_images import TrainingImages, pixel_mixtures, real_images

SHAPE, CLASSES = (3, 2, 2), 3


@pytest.fixture(params=[2048, 7])
def real(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainingImages, list, list]:
    """The train split of a shuffled table in one row group and in several, its images uint8 (H, W, C) and labels by image_id."""
    monkeypatch.setattr(tables, "ROW_GROUP", request.param)
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (60, *SHAPE), dtype=np.uint8), np.arange(60) % CLASSES
    splits = np.array(["train", "train", "val", "train", "test"] * 12)
    data = build("toy", images, labels, splits, ("a", "b", "c"))
    shuffled = data.frame.sample(fraction=1.0, shuffle=True, seed=1)
    tables.write(shuffled, tmp_path / "real.parquet", tables.REAL)
    train = [number for number in range(60) if splits[number] == "train"]
    return TrainingImages(tmp_path / "real.parquet", SHAPE), [images[n] for n in train], [int(labels[n]) for n in train]


def plan(kind: str, labels: list[int], **settings: object) -> pl.DataFrame:
    config = PlanConfig(kinds=(kind,), **{"ratios": 5, "sets_per_pair": 40, **settings})
    return make_plan(CLASSES, "data", "net", config, labels=np.array(labels))


def pixels(images: torch.Tensor) -> list:
    return list(images.permute(0, 2, 3, 1).numpy())


def test_images_are_taken_by_their_place_in_the_split(real) -> None:
    images, by_number, labels = real
    assert images.labels.tolist() == labels
    wanted = [5, 0, 35, 5, 17, 20]
    for got, number in zip(pixels(images.take(np.array(wanted))), wanted, strict=True):
        assert (got == by_number[number]).all()
    assert images.take(np.array([], dtype=np.int64)).shape == (0, 2, 3, 2)


def test_real_rows_are_the_training_images(real) -> None:
    images, by_number, labels = real
    rows = plan("real", labels).sample(fraction=1.0, shuffle=True, seed=2)
    for got, row in zip(pixels(real_images(rows, images)), rows.rows(named=True), strict=True):
        assert (got == by_number[row["group"]]).all()
        assert labels[row["group"]] == row["class_a"] == row["class_b"]


@pytest.mark.parametrize("noise", ["set", "image"])
def test_pixel_mixtures_are_those_of_a_loop(real, noise: str) -> None:
    images, by_number, labels = real
    rows = plan("pixel", labels, noise=noise)
    ends = images.pair(rows)
    made = pixels(pixel_mixtures(rows, images))
    for got, row, first, second in zip(made, rows.rows(named=True), *ends, strict=True):
        assert (labels[first], labels[second]) == (row["class_a"], row["class_b"])
        lam = float(row["lam"])
        wanted = np.rint(lam * by_number[first].astype(np.float64) + (1 - lam) * by_number[second].astype(np.float64))
        assert (got == wanted.astype(np.uint8)).all()
    sets = {}
    for row, first, second in zip(rows.rows(named=True), *ends, strict=True):
        sets.setdefault((row["class_a"], row["class_b"], row["group"]), set()).add((int(first), int(second)))
    # A set of one noise has one pair of images, and others have others; of its own noises it has about as many as images.
    assert {len(pairs) for pairs in sets.values()} <= ({1} if noise == "set" else {3, 4, 5})
    assert len(set.union(*sets.values())) > 80


def test_every_image_of_a_class_is_drawn(real) -> None:
    images, _, labels = real
    rows = plan("pixel", labels, sets_per_pair=200, ratios=2)
    first, second = images.pair(rows)
    for label in range(CLASSES):
        of_class = {number for number, other in enumerate(labels) if other == label}
        drawn = {*first[rows["class_a"].to_numpy() == label].tolist(), *second[rows["class_b"].to_numpy() == label].tolist()}
        assert drawn == of_class


def test_the_nearer_image_is_one_of_the_two(real) -> None:
    images, _, labels = real
    rows = plan("noised", labels)
    middle = []
    for row, number, first, second in zip(rows.rows(named=True), images.nearer(rows), *images.pair(rows), strict=True):
        if row["lam"] == 0.5:
            middle.append(number == first)
            assert number in (first, second)
        else:
            assert number == (first if row["lam"] > 0.5 else second)
    assert 0.3 < np.mean(middle) < 0.7


def test_a_plan_of_other_data_is_refused(real) -> None:
    images, _, labels = real
    with pytest.raises(InputError, match="plan: training image 36 of 36: run csm plan again"):
        real_images(plan("real", [*labels, 0]), images)
    other = make_plan(4, "data", "net", PlanConfig(kinds=("pixel",), sets_per_pair=1))
    with pytest.raises(InputError, match="plan: class 3 has no training image: run csm plan again"):
        pixel_mixtures(other, images)
