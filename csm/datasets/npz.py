"""Arrays of numpy in one file: images and labels, or those of each split."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from csm.datasets.decoding import check_form, resize
from csm.datasets.real import RealDataset, Seed, build, complete_splits
from csm.datasets.source_files import number_classes, read_class_names
from csm.errors import InputError
from csm.pickles import not_plain

# Split -> names of its images and labels; MedMNIST's come last.
KEYS = {
    "train": (("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (("x_val", "y_val"), ("x_valid", "y_valid"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}
_EXPECTED = "images and labels, or x_train, y_train, x_test, y_test (x_val, y_val), or train_images, train_labels, ..."


def npz(path: str, class_names: str = "", size: int = 0, val: float = 0.1, test: float = 0.2, seed: Seed = 0) -> RealDataset:
    """Read a file ``*.npz`` with arrays ``images`` and ``labels``, or such arrays for each split.

    Images are uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), labels whole numbers (N,) or (N, 1). A missing validation or test split is
    cut from the training one with the fractions ``val`` and ``test``, stratified.

    Args:
        path: the file.
        class_names: a text file with a name on each line; empty: the array ``class_names`` of the file if it is there, else the numbers.
        size: height and width to resize to; 0: as they are.

    Raises:
        InputError: the file is missing or damaged, holds other arrays or pickles, or a label is no class.
    """
    check_form(size)
    file = Path(path)
    parts = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for split, pairs in KEYS.items():
                pair = next((pair for pair in pairs if pair[0] in arrays), None)
                if pair is not None:
                    parts[split] = _part(file, arrays, *pair, size)
            names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else ()
            found = ", ".join(arrays.files)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"data.path: {file} does not exist; expected a file *.npz with {_EXPECTED}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise InputError(f"data.path: {file} {not_plain(file, error)}") from None
    if "train" not in parts:
        raise InputError(f"data.path: {file} has the arrays {found or 'none'}; expected {_EXPECTED}")
    shapes = {split: images.shape[1:] for split, (images, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"data.path: {file} has images of other shapes in each split {shapes}: set data.size")
    numbers = np.concatenate([labels for _, labels in parts.values()])
    targets, known = number_classes(numbers.tolist(), read_class_names(class_names) or names, f"data.path: {file}")
    splits = np.repeat(list(parts), [len(labels) for _, labels in parts.values()])
    images = np.concatenate([images for images, _ in parts.values()])
    parts.clear()
    complete = complete_splits(targets, splits, shapes, val, test, seed)
    return build(file.stem, images, targets, complete, known)


def _part(file: Path, arrays: Any, image_key: str, label_key: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, C) and labels (N,) of one split."""
    if label_key not in arrays:
        raise InputError(f"data.path: {file} has {image_key} without {label_key}")
    images, labels = arrays[image_key], arrays[label_key]
    if images.dtype != np.uint8:
        raise InputError(f"data.path: {file}: {image_key} is {images.dtype}; expected uint8, levels from 0 to 255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise InputError(
            f"data.path: {file}: {image_key} has shape {arrays[image_key].shape}; expected (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iuU" or labels.shape != images.shape[:1]:
        raise InputError(
            f"data.path: {file}: {label_key} is {labels.dtype} of shape {labels.shape}; expected one whole number for each of "
            f"{len(images)} images"
        )
    return resize(images, size), labels
