"""The files of a data set: found by a path or pattern, told apart by name, with class names beside them."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from csm.errors import InputError

MAX_LABEL = 65535  # 16 bits of the `real` table

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}


def find_files(path: str, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """Files with one of ``suffixes`` (of any case; "": all), sorted: ``path`` itself, all below a folder, or all that a pattern matches.

    Empty if there are none.
    """
    root = Path(path)
    if root.is_dir():
        found = [Path(folder, name) for folder, _, names in os.walk(root) for name in names if name.lower().endswith(suffixes)]
        return sorted(found)
    if root.is_file():
        return [root]
    return sorted(
        Path(name) for name in glob.glob(path, recursive=True) if name.lower().endswith(suffixes) and os.path.isfile(name)
    )


def some_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """What ``find_files`` finds; ``InputError`` if that is nothing."""
    files = find_files(path, suffixes)
    if not files:
        missing = "holds no such file" if Path(path).is_dir() else "does not exist"
        raise InputError(
            f"data.path: expected {' or '.join(f'*{suffix}' for suffix in suffixes)}, a folder of them or a pattern, "
            f"but {path!r} {missing}"
        )
    return files


def stamps(path: str, suffixes: tuple[str, ...] = ("",)) -> list[tuple[str, int, int]]:
    """(name, bytes, modification time in ns) of every file that ``find_files`` finds: changes when they do."""
    root = Path(path)
    stamped = []
    for file in find_files(path, suffixes):
        status = file.stat()
        stamped.append((str(file.relative_to(root)) if root.is_dir() else str(file), status.st_size, status.st_mtime_ns))
    return stamped


def splits_of(files: Sequence[Path]) -> list[str]:
    """The split of each file, by the first word of its name (train-00000-of-00002.parquet) or else by its folder's name (train).

    If no name says one, all are "train".

    Raises:
        InputError: some names say a split and others do not.
    """
    splits = [_split_of(file.name) or _SPLIT_NAMES.get(file.parent.name.lower(), "") for file in files]
    if not any(splits):
        return ["train"] * len(files)
    for file, split in zip(files, splits, strict=True):
        if not split:
            raise InputError(
                f"{file}: its name says no split as those of other files do; expected train-*, val-* or test-*: rename or move it"
            )
    return splits


def read_class_names(path: str) -> tuple[str, ...]:
    """Names of a text file, one on each line, of the classes 0, 1, ...; none if ``path`` is empty."""
    if not path:
        return ()
    try:
        return tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise InputError(
            f"data.class_names: expected a text file with one name on each line, but {path} is not ({reason})"
        ) from None


def number_classes(labels: Sequence[int | str], class_names: Sequence[str], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 (N,) and the names of the classes 0..K-1.

    Args:
        labels: all whole numbers, which stay, or all names.
        class_names: known names; without them, numbers are named "0" to the largest, and names are sorted.
        where: the labels come from, for the message.

    Raises:
        InputError: numbers and names are mixed, a number is below 0 or above 65535, or a name is not among ``class_names``.
    """
    kinds = {type(label) for label in labels}
    if len(kinds) > 1 or not kinds <= {int, str}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"{where}: expected labels that are all whole numbers or all names, got {found}")
    if kinds == {str}:
        known = tuple(class_names) or tuple(map(str, sorted(set(labels))))
        index = {name: number for number, name in enumerate(known)}
        missing = next((label for label in labels if label not in index), None)
        if missing is not None:
            raise InputError(f"{where}: label {missing!r} is none of the {len(known)} class names")
        return np.array([index[str(label)] for label in labels], dtype=np.int64), known
    outside = next((label for label in labels if not 0 <= int(label) <= MAX_LABEL), None)
    if outside is not None:
        raise InputError(f"{where}: label {outside} is no class; expected 0 to K - 1, with every image labelled")
    numbers = np.array(labels, dtype=np.int64)
    return numbers, tuple(class_names) or tuple(map(str, range(numbers.max(initial=-1) + 1)))


def _split_of(name: str) -> str:
    word = re.match(r"[a-z]+", name.lower())
    return _SPLIT_NAMES.get(word[0], "") if word else ""
