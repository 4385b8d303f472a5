"""A folder of images: FOLDER/CLASS/*.png, or FOLDER/{train,val,test}/CLASS/*.png."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from csm import tables
from csm.datasets.real import RealDataset, build, stratified_splits
from csm.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_folder(
    path: str,
    size: int = 32,
    channels: int = 3,
    val: float = 0.15,
    test: float = 0.25,
    seed: int = 0,
) -> RealDataset:
    """Read a folder with one subfolder per class, whose sorted names are the class names.

    If ``path`` holds a folder ``train``, the folders ``train``, ``val`` and ``test`` are the splits (a missing ``val`` or ``test`` is
    cut from ``train`` with the fractions ``val`` and ``test``); else all three are cut from the whole, stratified and seeded.

    Args:
        path: the folder.
        size: height and width in pixels; larger images are centre-cropped to a square and resized (antialiased bicubic).
        channels: 3 (RGB) or 1 (grey).

    Raises:
        InputError: the folder is missing or has fewer than two classes, or an image cannot be read (it is named).
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"data.path: image folder {root} does not exist")
    if channels not in (1, 3):
        raise InputError(f"data.channels: expected 1 (grey) or 3 (RGB), got {channels}")
    if not 1 <= size <= 4096:
        raise InputError(f"data.size: expected pixels from 1 to 4096, got {size}")
    parts = {"train": root / "train"} if (root / "train").is_dir() else {"": root}
    parts |= {name: root / name for name in ("val", "test") if "train" in parts and (root / name).is_dir()}
    files = {name: _files(folder) for name, folder in parts.items()}
    class_names = sorted({label for members in files.values() for label, _ in members})
    if len(class_names) < 2:
        raise InputError(
            f"data.path: {root} has {len(class_names)} class folder(s) with images {class_names}: at least 2 are needed"
        )

    index = {label: number for number, label in enumerate(class_names)}
    images, labels, splits = [], [], []
    for name, members in files.items():
        numbers = np.array([index[label] for label, _ in members])
        images += [_read(file, size, channels) for _, file in members]
        labels.append(numbers)
        if name in ("val", "test"):
            splits.append(np.full(len(members), name, dtype="<U5"))
        else:
            splits.append(stratified_splits(numbers, 0.0 if "val" in parts else val, 0.0 if "test" in parts else test, seed))
    return build(root.name, np.stack(images), np.concatenate(labels), np.concatenate(splits), class_names)


def source_files(path: str) -> list[tuple[str, int, int]]:
    """(relative name, bytes, modification time in ns) of every image below ``path``: changes when the folder does."""
    root = Path(path)
    found = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    return [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(class name, file) for every image of every class folder, sorted."""
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in tables.SPLITS)
    return [
        (directory.name, file)
        for directory in classes
        for file in sorted(directory.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    """Decode one image to uint8 (size, size, channels)."""
    try:
        with Image.open(file) as image:
            image.load()
            square = _centre_square(_eight_bit(image).convert("RGB" if channels == 3 else "L"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {file} ({error}): repair or remove it and run again") from None
    if square.size != (size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.uint8).reshape(size, size, channels)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey levels to 8 bits; PIL's own conversion clips them at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
