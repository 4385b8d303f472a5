import numpy as np
import polars as pl
import pytest
from sklearn.datasets import load_digits

from csm.datasets import RealDataset
from csm.datasets.digits import digits, digits_degraded, digits_hard
from csm.errors import InputError


@pytest.fixture(scope="module")
def hard() -> RealDataset:
    return digits_hard()


@pytest.fixture(scope="module")
def plain() -> RealDataset:
    return digits()


def pixels(dataset: RealDataset) -> np.ndarray:
    """uint8 (N, 8, 8), by image_id."""
    cells = dataset.frame.sort("image_id")["image"].to_list()
    return np.stack([np.frombuffer(cell, dtype=np.uint8).reshape(8, 8) for cell in cells])


def test_the_same_call_gives_the_same_table(hard: RealDataset) -> None:
    again = digits_hard()
    assert again.info == hard.info
    assert again.frame.equals(hard.frame)


def test_another_seed_gives_other_pixels_and_splits(hard: RealDataset) -> None:
    other = digits_hard(seed=1)
    assert other.info.digest != hard.info.digest
    assert (pixels(other) != pixels(hard)).mean() > 0.5
    assert not other.frame["split"].equals(hard.frame["split"])


@pytest.mark.parametrize("source", ["hard", "plain"])
def test_labels_are_those_of_scikit_learn(source: str, request: pytest.FixtureRequest) -> None:
    frame = request.getfixturevalue(source).frame.sort("image_id")
    assert frame["image_id"].to_list() == list(range(1797))
    assert frame["label"].to_list() == load_digits().target.tolist()


def test_plain_pixels_are_those_of_scikit_learn(plain: RealDataset) -> None:
    levels = load_digits().images  # 0..16
    assert np.abs(pixels(plain) - levels * 255 / 16).max() <= 0.5
    assert len(np.unique(pixels(plain))) == 17


@pytest.mark.parametrize(("source", "val", "test"), [("hard", 0.3, 0.4), ("plain", 0.2, 0.4)])
def test_splits_are_disjoint_complete_and_stratified(
    source: str, val: float, test: float, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(source)
    members = {name: set(dataset.frame.filter(pl.col("split") == name)["image_id"]) for name in ("train", "val", "test")}
    assert sum(len(ids) for ids in members.values()) == 1797
    assert set.union(*members.values()) == set(range(1797))
    assert {name: len(ids) for name, ids in members.items()} == dataset.info.counts
    target = load_digits().target
    for label in range(10):
        ids = set(np.flatnonzero(target == label).tolist())
        assert abs(len(ids & members["val"]) - val * len(ids)) <= 0.5
        assert abs(len(ids & members["test"]) - test * len(ids)) <= 0.5


def test_pixels_do_not_depend_on_the_split(hard: RealDataset) -> None:
    assert np.array_equal(pixels(digits_hard(val=0.1, test=0.2)), pixels(hard))


def test_without_hardness_they_are_the_plain_ones(plain: RealDataset) -> None:
    assert np.array_equal(pixels(digits_hard(max_shift=0.0, blur=0.0, noise=0.0)), pixels(plain))


def test_noise_has_the_stated_spread(plain: RealDataset) -> None:
    noisy = pixels(digits_hard(max_shift=0.0, blur=0.0, noise=0.1)).astype(float)
    middle = (pixels(plain) > 100) & (pixels(plain) < 155)  # four standard deviations from the ends: not clipped
    error = (noisy - pixels(plain))[middle] / 255
    assert error.std() == pytest.approx(0.1, rel=0.05)
    assert error.mean() == pytest.approx(0.0, abs=0.005)


def test_shifts_are_uniform_up_to_the_stated_size(plain: RealDataset) -> None:
    still, moved = (pixels(dataset).astype(float) for dataset in (plain, digits_hard(max_shift=0.5, blur=0.0, noise=0.0)))
    inside = still[:, :, [0, 7]].sum(axis=(1, 2)) == 0  # nothing falls over the left or right edge
    assert inside.sum() > 300
    before, after = ((images.sum(axis=1) * np.arange(8)).sum(axis=1) / images.sum(axis=(1, 2)) for images in (still, moved))
    shift = (after - before)[inside]
    assert np.quantile(shift, [0.1, 0.5, 0.9]) == pytest.approx([-0.4, 0.0, 0.4], abs=0.06)


def test_statistics_come_from_the_train_split_alone(hard: RealDataset) -> None:
    train = hard.frame.sort("image_id")["split"].to_numpy() == "train"
    values = pixels(hard)[train].astype(float) / 255
    assert hard.info.mean == pytest.approx((values.mean(),), abs=1e-12)
    assert hard.info.std == pytest.approx((values.std(),), abs=1e-12)
    assert abs(pixels(hard).mean() / 255 - hard.info.mean[0]) > 1e-5  # those of all images differ


def test_shape_and_names(hard: RealDataset) -> None:
    assert hard.info.shape == (8, 8, 1)
    assert hard.info.class_names == tuple("0123456789")
    images, labels = hard.split("val")
    assert images.shape == (hard.info.counts["val"], 1, 8, 8)
    assert len(labels) == hard.info.counts["val"]


@pytest.fixture(scope="module")
def degraded() -> RealDataset:
    return digits_degraded()


CLEAN = {"blur": 0.0, "contrast": 1.0, "noise": 0.0, "patch": 0}


def test_degraded_digits_are_those_of_scikit_learn_and_always_the_same(degraded: RealDataset) -> None:
    again = digits_degraded()
    assert again.info == degraded.info
    assert again.frame.equals(degraded.frame)
    assert degraded.frame.sort("image_id")["label"].to_list() == load_digits().target.tolist()
    assert np.array_equal(pixels(digits_degraded(val=0.1, test=0.2)), pixels(degraded))
    assert (pixels(digits_degraded(seed=1)) != pixels(degraded)).mean() > 0.5


def test_without_degradation_they_are_the_plain_ones(plain: RealDataset) -> None:
    assert np.array_equal(pixels(digits_degraded(**CLEAN)), pixels(plain))


def test_a_black_square_covers_each_image_at_any_place(plain: RealDataset) -> None:
    before, after = (pixels(dataset).astype(int) for dataset in (plain, digits_degraded(**{**CLEAN, "patch": 3})))
    changed = after != before
    assert (after[changed] == 0).all()
    rows, columns = changed.any(axis=2), changed.any(axis=1)
    for lost in (rows, columns):
        first, last = lost.argmax(axis=1), 7 - lost[:, ::-1].argmax(axis=1)
        assert (last - first)[lost.any(axis=1)].max() == 2  # no higher and no wider than the square
        assert set(first[lost.sum(axis=1) == 3]) == set(range(6))


def test_contrast_is_drawn_for_each_image(plain: RealDataset) -> None:
    before, after = (pixels(dataset).astype(float) for dataset in (plain, digits_degraded(**{**CLEAN, "contrast": 0.4})))
    scale = (before * after).sum(axis=(1, 2)) / (before**2).sum(axis=(1, 2))
    assert np.quantile(scale, [0.0, 0.5, 1.0]) == pytest.approx([0.4, 0.7, 1.0], abs=0.03)
    assert np.abs(after - scale[:, None, None] * before).max() < 1.5  # of 255: rounding


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrast": 0.0}, "data.contrast: expected more than 0 and at most 1, got 0"),
        ({"patch": 9}, "data.patch: expected 0 to 8, the side of the images, got 9"),
    ],
)
def test_degradations_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        digits_degraded(**settings)
