"""Images that belong to none of the classes: another data set, or pieces of photographs."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from csm.datasets import DATASETS, load_dataset
from csm.datasets.real import RealDataset
from csm.datasets.shifts.part import ShiftPart, fit_images
from csm.errors import InputError
from csm.parameters import check_name, check_parameters

TAKE = ("test", "all")


def other_dataset(data: RealDataset, source: str, take: str = "test", **settings: Any) -> Iterator[ShiftPart]:
    """The images of another data set, in the shape of ``data`` (see ``fit_images``).

    Args:
        data: whose shape the images take.
        source: key of ``DATASETS``; ``settings`` are its own.
        take: "test", its test split, or "all" of its images.

    Raises:
        InputError: what the source raises (when the part is made).
    """

    def parts() -> Iterator[ShiftPart]:
        other = load_dataset(source, **settings)
        if other.info.digest == data.info.digest:
            raise InputError(f"source: {source!r} is the data set itself; name another one")
        splits = [other.split(split)[0] for split in (("train", "val", "test") if take == "all" else ("test",))]
        yield ShiftPart(None, None, fit_images(torch.cat(splits), data.info.shape), None)

    return parts()


def check_other_dataset(parameters: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of ``other_dataset``, those of the source checked against that source."""
    own = {key: value for key, value in parameters.items() if key in ("source", "take")}
    own = check_parameters(other_dataset, own, where)
    check_name(f"{where}.source", own["source"], DATASETS)
    check_name(f"{where}.take", own.get("take", "test"), TAKE)
    source = DATASETS[own["source"]]
    given = {key: value for key, value in parameters.items() if key not in own}
    allowed = inspect.signature(source).parameters
    for key in given:
        if key not in allowed:
            names = ", ".join(("source", "take", *allowed))
            raise InputError(f"{where}.{key}: no such setting with source {own['source']}; allowed: {names}")
    return own | check_parameters(source, given, where)


def photographs(data: RealDataset, count: int = 1000, seed: int = 0) -> Iterator[ShiftPart]:
    """Pieces of the two photographs that come with scikit-learn (a Chinese palace, a flower; 427 x 640), in the shape of ``data``.

    A piece has the aspect of the shape, a size between that of the shape and the largest that the photograph holds (uniform in its
    logarithm), and a place (uniform); all three are functions of ``seed`` and the number of the piece.

    Args:
        data: whose shape the images take.
        count: number of pieces.
        seed: of the draw.
    """
    if count < 1 or seed < 0:
        raise InputError(f"count, seed: expected at least 1 and 0, got {count} and {seed}")

    def parts() -> Iterator[ShiftPart]:
        from sklearn.datasets import load_sample_images  # a second to import, which every worker would pay

        photos = [torch.from_numpy(photo.transpose(2, 0, 1).copy()) for photo in load_sample_images().images]
        height, width, _ = data.info.shape
        pieces = []
        for number in range(count):
            draw = np.random.default_rng([seed, number])
            photo = photos[draw.integers(len(photos))]
            scale = max(1.0, min(photo.shape[1] / height, photo.shape[2] / width)) ** draw.random()
            sides = [min(have, round(want * scale)) for have, want in zip(photo.shape[1:], (height, width), strict=True)]
            top, left = (int(draw.integers(have - side + 1)) for have, side in zip(photo.shape[1:], sides, strict=True))
            piece = photo[None, :, top : top + sides[0], left : left + sides[1]]
            pieces.append(fit_images(piece, data.info.shape))
        yield ShiftPart(None, None, torch.cat(pieces), None)

    return parts()
