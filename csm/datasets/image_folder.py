"""A folder of images: FOLDER/CLASS/*.png, or FOLDER/{train,val,test}/CLASS/*.png."""

from pathlib import Path

import numpy as np

from csm import tables
from csm.datasets.decoding import check_form, decode
from csm.datasets.real import RealDataset, Seed, build, complete_splits
from csm.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def image_folder(
    path: str,
    size: int = 32,
    channels: int = 3,
    val: float = 0.15,
    test: float = 0.25,
    seed: Seed = 0,
) -> RealDataset:
    """Read a folder with one subfolder per class, whose sorted names are the class names.

    If ``path`` holds a folder ``train``, the folders ``train``, ``val`` and ``test`` are the splits (a missing ``val`` or ``test`` is
    cut from ``train`` with the fractions ``val`` and ``test``); else all three are cut from the whole, stratified and seeded.

    Args:
        path: the folder.
        size: height and width in pixels; other images are centre-cropped to a square and resized (antialiased bicubic).
            0: as they are, all of one shape.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        InputError: the folder is missing or has fewer than two classes, or an image cannot be read (it is named).
    """
    root = Path(path)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise InputError(f"data.path: image folder {root} {what}; give one with a subfolder for each class")
    check_form(size, channels)
    parts = {"train": root}
    if (root / "train").is_dir():
        parts = {name: root / name for name in tables.SPLITS if name == "train" or (root / name).is_dir()}
        beside = sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name not in tables.SPLITS)
        other = next((entry.name for entry in beside if _files(entry)), None)
        if other:
            raise InputError(
                f"data.path: {root} has a folder {other} like a split, but splits are {', '.join(tables.SPLITS)}: rename or move it"
            )
    files = {name: _files(folder) for name, folder in parts.items()}
    class_names = sorted({label for members in files.values() for label, _ in members})
    if len(class_names) < 2:
        raise InputError(
            f"data.path: {root} has {len(class_names)} class folder(s) with images {class_names}: at least 2 are needed"
        )

    index = {label: number for number, label in enumerate(class_names)}
    members = [member for name in parts for member in files[name]]
    labels = np.array([index[label] for label, _ in members])
    splits = np.repeat(list(parts), [len(files[name]) for name in parts])
    images = decode(((str(file), file) for _, file in members), len(members), size, channels)
    return build(root.name, images, labels, complete_splits(labels, splits, parts, val, test, seed), class_names)


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(class name, file) for every image of every class folder, sorted."""
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in tables.SPLITS)
    return [
        (directory.name, file)
        for directory in classes
        for file in sorted(directory.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
