"""Tiny-ImageNet (Stanford CS231n) as it is published: 200 classes of 64x64 JPEG files, with a list of labels beside its `val`."""

from collections import Counter
from pathlib import Path

import numpy as np

from csm.datasets.decoding import check_form, decode
from csm.datasets.real import RealDataset, Seed, build, complete_splits
from csm.errors import InputError

EXPECTED = "expected the folder tiny-imagenet-200 with wnids.txt, words.txt, train/WNID/images/*.JPEG, val/val_annotations.txt"


def tiny_imagenet(path: str, val: float = 0.1, seed: Seed = 0, size: int = 0, channels: int = 3) -> RealDataset:
    """Tiny-ImageNet: its ``val`` is the test split here, for the labels of its own test images are not published.

    Classes are in the order of their WordNet ids, named by the first of their words; where two have the same, the id follows.

    Args:
        path: the folder ``tiny-imagenet-200``, or the one that holds it.
        val: fraction of each class of the training images in the validation split (0.1: 90,000 and 10,000), drawn with ``seed``.
        size: height and width to resize to; 0: as they are.
        channels: 3 (RGB; a few of its images are grey) or 1 (grey).

    Raises:
        InputError: a file is missing or damaged (it is named).
    """
    check_form(size, channels)
    root = Path(path)
    if not (root / "wnids.txt").is_file() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    ids = sorted(line.strip() for line in _lines(root / "wnids.txt") if line.strip())
    index = {wnid: number for number, wnid in enumerate(ids)}
    words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)

    files: list[Path] = []
    labels: list[int] = []
    for wnid in ids:
        members = sorted((root / "train" / wnid / "images").glob("*.JPEG"))
        if not members:
            raise InputError(f"data.path: {root / 'train' / wnid / 'images'} has no *.JPEG; {EXPECTED}")
        files += members
        labels += [index[wnid]] * len(members)
    n_train = len(files)
    annotations = root / "val" / "val_annotations.txt"
    for line in _lines(annotations):
        name, wnid = ([*line.split("\t"), ""])[:2]
        if wnid not in index or "/" in name:
            raise InputError(f"{annotations}: line {line!r} is not a file name, a tab and an id of wnids.txt")
        files.append(root / "val" / "images" / name)
        labels.append(index[wnid])
    images = decode(((str(file), file) for file in files), len(files), size, channels)
    targets = np.array(labels)
    splits = np.repeat(["train", "test"], [n_train, len(files) - n_train])
    return build(
        "tiny-imagenet", images, targets, complete_splits(targets, splits, ("test",), val, 0.0, seed), _names(ids, words)
    )


def _names(ids: list[str], words: dict[str, str]) -> list[str]:
    first = [words.get(wnid, wnid).split(",")[0].strip() for wnid in ids]
    count = Counter(first)
    return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(first, ids, strict=True)]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{file} is no UTF-8 text: get it again") from None
    except OSError:
        raise InputError(f"data.path: there is no {file}; {EXPECTED}") from None
