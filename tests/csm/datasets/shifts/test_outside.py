import inspect
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_sample_images

from csm.datasets import DATASETS, RealDataset, load_dataset
from csm.datasets.shifts.outside import check_other_dataset, other_dataset, photographs
from csm.errors import InputError

Real = Callable[..., RealDataset]


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (64, 48, 3)])
def test_photographs_come_in_the_shape_of_the_data(real: Real, shape: tuple[int, int, int]) -> None:
    (part,) = photographs(real(shape), count=20)
    assert (part.corruption, part.severity, part.labels) == (None, None, None)
    assert part.images.shape == (20, shape[2], *shape[:2])
    assert part.images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in part.images}) == 20


def test_pieces_are_functions_of_seed_and_number(real: Real) -> None:
    (few,), (many,), (other,) = (photographs(real(), count=count, seed=seed) for count, seed in ((5, 0), (9, 0), (5, 1)))
    assert torch.equal(many.images[:5], few.images)
    assert not torch.equal(other.images, few.images)


def test_a_piece_as_large_as_the_photograph_is_the_photograph(real: Real) -> None:
    height, width = 427, 640
    (part,) = photographs(real((height, width, 3), ("a", "b")), count=4)
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    assert all(any(torch.equal(image, photo) for photo in photos) for image in part.images)


def test_a_shape_larger_than_the_photograph_is_filled(real: Real) -> None:
    (part,) = photographs(real((448, 700, 1), ("a", "b")), count=1)
    assert part.images.shape == (1, 1, 448, 700)


@pytest.mark.parametrize("bad", [{"count": 0}, {"seed": -1}])
def test_photographs_out_of_range(real: Real, bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match="count, seed: expected at least 1 and 0"):
        photographs(real(), **bad)


def test_another_data_set_gives_its_test_split_in_the_shape_of_the_data(real: Real) -> None:
    (part,) = other_dataset(real((32, 32, 3)), "digits", test=0.1)
    digits = load_dataset("digits", test=0.1)
    assert part.images.shape == (digits.info.counts["test"], 3, 32, 32)
    assert (part.corruption, part.severity, part.labels) == (None, None, None)
    (whole,) = other_dataset(real((8, 8, 1)), "digits", take="all")
    images = torch.cat([digits.split(split)[0] for split in ("train", "val", "test")])
    assert sorted(image.numpy().tobytes() for image in whole.images) == sorted(image.numpy().tobytes() for image in images)


def test_the_data_set_itself_is_not_outside_of_it() -> None:
    with pytest.raises(InputError, match="source: 'digits' is the data set itself; name another one"):
        next(other_dataset(load_dataset("digits"), "digits"))


def test_settings_are_checked_against_the_source() -> None:
    checked = check_other_dataset({"source": "digits-hard", "noise": 1, "take": "all"}, "here")
    assert checked == {"source": "digits-hard", "take": "all", "noise": 1.0}
    assert isinstance(checked["noise"], float)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "here.source: missing"),
        ({"source": "nope"}, "here.source: unknown 'nope'; one of digits"),
        ({"source": "digits", "take": "train"}, "here.take: unknown 'train'; one of test, all"),
        (
            {"source": "digits", "noise": 0.1},
            "here.noise: no such setting with source digits; allowed: source, take, val, test, seed",
        ),
        ({"source": "digits", "test": "many"}, "here.test: expected a number"),
        ({"source": "image-folder"}, "here.path: missing"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_other_dataset(settings, "here")


def test_no_source_has_a_setting_of_the_kind_s_own() -> None:
    for source in DATASETS.values():
        assert not {"source", "take", "data"} & set(inspect.signature(source).parameters)
