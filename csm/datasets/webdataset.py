"""Tar files of WebDataset: the files of a sample stand together and share their name up to the first dot."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from csm.datasets.decoding import check_form, decode
from csm.datasets.real import RealDataset, Seed, build, complete_splits
from csm.datasets.source_files import number_classes, read_class_names, some_files, splits_of
from csm.datasets.tar_files import members
from csm.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("png", "jpg", "jpeg", "webp")


def webdataset(
    path: str,
    class_names: str = "",
    size: int = 0,
    channels: int = 3,
    val: float = 0.1,
    test: float = 0.2,
    seed: Seed = 0,
) -> RealDataset:
    """Read tar files; the first word of a file's name, or its folder's name, says the split (train, val or validation or valid, test).

    A sample is an image (``KEY.png``, ``.jpg``, ``.jpeg`` or ``.webp``) with its label: ``KEY.cls``, a whole number as text, or
    ``KEY.json``, an object with a number or name ``label``. A missing validation or test split is cut from the training one with the
    fractions ``val`` and ``test``, stratified.

    Args:
        path: a file, a folder with such files anywhere below it, or a pattern (``shards/train-*.tar``).
        class_names: a text file with a name on each line; empty: the numbers, or the names of the labels, sorted.
        size: height and width in pixels that all images are cropped and resized to; 0: as they are, all of one shape.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        InputError: no file, a damaged one, a sample without an image or a label, an image that cannot be read, a label that is no class.
    """
    check_form(size, channels)
    files = some_files(path, SUFFIXES)
    parts = splits_of(files)
    counts = [0] * len(files)
    labels: list[int | str] = []
    encoded: list[tuple[str, Path | bytes]] = []
    for number, file in enumerate(files):
        for name, image, label in _samples(file):
            encoded.append((name, image))
            labels.append(label)
            counts[number] += 1
    targets, known = number_classes(labels, read_class_names(class_names), f"data.path: {path}")
    images = decode(encoded, len(targets), size, channels)
    encoded.clear()
    splits = np.repeat(np.array(parts), counts)
    return build(Path(path).stem, images, targets, complete_splits(targets, splits, parts, val, test, seed), known)


def _samples(file: Path) -> Iterator[tuple[str, bytes, int | str]]:
    """Name, encoded image and label of every sample of a tar file."""
    for key, parts in groupby(_members(file), key=lambda member: member[0]):
        where = f"{file}: {key}"
        sample = {kind: content for _, kind, content in parts}
        image = next((sample[kind] for kind in IMAGES if kind in sample), None)
        if image is None:
            raise InputError(f"{where} has no image, only {', '.join(sample)}; expected {', '.join(IMAGES)} beside its label")
        yield where, image, _label(sample, where)


def _label(sample: dict[str, bytes], where: str) -> int | str:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        value: Any = json.loads(sample["json"])["label"]
    except (ValueError, KeyError, TypeError):
        value = None
    if type(value) not in (int, str):
        raise InputError(f"{where} has no label; expected a whole number in .cls, or .json with a number or name 'label'")
    return value  # type: ignore[no-any-return]


def _members(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """Key, kind (what follows the first dot of the name) and content of every file in a tar file."""
    for path, content in members(file):
        folder, slash, name = path.rpartition("/")
        key, _, kind = name.partition(".")
        yield folder + slash + key, kind.lower(), content
