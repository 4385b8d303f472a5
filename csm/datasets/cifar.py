"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are published: archives of Python 2's pickles, which are read without running them."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from csm.datasets.decoding import check_form, resize
from csm.datasets.real import RealDataset, Seed, build, complete_splits
from csm.datasets.tar_files import members
from csm.errors import InputError
from csm.pickles import Record, read_pickle

CIFAR10 = {**{f"data_batch_{number}": "train" for number in range(1, 6)}, "test_batch": "test"}
CIFAR100 = {"train": "train", "test": "test"}

_RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_KNOWN = {"numpy.ndarray", "numpy.dtype", *_RECONSTRUCT}
_SIDE = 32  # pixels; three planes of _SIDE * _SIDE bytes an image: red, green, blue


def cifar10(path: str, val: float = 0.1, seed: Seed = 0, size: int = 0) -> RealDataset:
    """CIFAR-10: ten classes, 50,000 images to train with and 10,000 to test, 32x32 in colour.

    Args:
        path: ``cifar-10-python.tar.gz``, or the folder in it, or the one that holds that.
        val: fraction of each class of the training images in the validation split (0.1: 45,000 and 5,000), drawn with ``seed``.
        size: height and width to resize to; 0: as they are.

    Raises:
        InputError: a file is missing, damaged, or no part of CIFAR-10.
    """
    return _load("cifar10", path, CIFAR10, "batches.meta", ("labels", "label_names"), val, seed, size)


def cifar100(path: str, labels: str = "fine", val: float = 0.1, seed: Seed = 0, size: int = 0) -> RealDataset:
    """CIFAR-100: ``labels`` "fine" (100 classes) or "coarse" (20), 50,000 images to train with and 10,000 to test; see ``cifar10``."""
    if labels not in ("fine", "coarse"):
        raise InputError(f"data.labels: expected fine or coarse, got {labels!r}")
    return _load("cifar100", path, CIFAR100, "meta", (f"{labels}_labels", f"{labels}_label_names"), val, seed, size)


def _load(
    name: str, path: str, batches: dict[str, str], meta: str, keys: tuple[str, str], val: float, seed: int, size: int
) -> RealDataset:
    check_form(size)
    contents = _contents(Path(path), [*batches, meta], name)
    images, labels, splits = [], [], []
    for batch, split in batches.items():
        where = f"{path}: {batch}"
        values = _read(contents.pop(batch), where)
        pixels = _pixels(values.get("data"), where)
        numbers = values.get(keys[0])
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers) or len(numbers) != len(pixels):
            raise InputError(
                f"{where} has no list {keys[0]!r} with a whole number for each of its {len(pixels)} images: get it again"
            )
        images.append(pixels)
        labels += numbers
        splits += [split] * len(numbers)
    names = _read(contents[meta], f"{path}: {meta}").get(keys[1])
    if not isinstance(names, list) or not all(isinstance(word, bytes | str) for word in names):
        raise InputError(f"{path}: {meta} has no list of names {keys[1]!r}: get it again")
    class_names = [word.decode("latin1") if isinstance(word, bytes) else word for word in names]
    targets = np.array(labels)
    complete = complete_splits(targets, np.array(splits), ("test",), val, 0.0, seed)
    return build(name, resize(np.concatenate(images), size), targets, complete, class_names)


def _contents(path: Path, names: list[str], source: str) -> dict[str, bytes]:
    """Content of each of ``names``, from a folder or a tar file."""
    found: dict[str, bytes] = {}
    if path.is_dir():
        below = [path, *sorted(folder for folder in path.glob("cifar-*") if folder.is_dir())]
        folder = next((folder for folder in below if (folder / names[0]).is_file()), path)
        found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    elif path.is_file():
        found = {base: content for name, content in members(path) if (base := name.rpartition("/")[2]) in names}
    else:
        raise InputError(f"data.path: {path} does not exist; expected the archive of {source} (Python version) or its folder")
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"data.path: {path} has no {missing[0]}; expected the archive of {source} (Python version) or its folder, "
            f"with {', '.join(names)}"
        )
    return found


def _read(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary of a pickle; Python 2 knows no difference of text and bytes, so keys come as either."""
    values = read_pickle(io.BytesIO(content), where, _KNOWN.__contains__, "CIFAR", encoding="bytes")
    if not isinstance(values, dict):
        raise InputError(f"{where} holds no dictionary: get it again")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in values.items()}


def _pixels(value: Any, where: str) -> np.ndarray:
    """Images uint8 (N, 32, 32, 3) of the record of an array uint8 (N, 3072)."""
    state = value.state if isinstance(value, Record) and value.name in _RECONSTRUCT else None
    _, shape, kind, fortran, content = state if isinstance(state, tuple) and len(state) == 5 else (None,) * 5
    code = kind.arguments[0] if isinstance(kind, Record) and kind.arguments else None
    width = 3 * _SIDE * _SIDE
    rows, rest = divmod(len(content), width) if isinstance(content, bytes) else (0, 1)
    if not isinstance(content, bytes) or rest or shape != (rows, width) or code not in ("u1", b"u1") or fortran:
        raise InputError(f"{where} has no array 'data' of {width} bytes for each image: get it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
