"""Images of many kinds of files, one after the other and with their labels if they have any: what a finished model is used on.

Other than the sources of ``csm.datasets``, which make a data set to train on, these need no splits, no statistics and no classes, hold the
images of one file at most, and leave it to the caller what to do about an image that cannot be read.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from csm import tables
from csm.datasets.decoding import decode_as
from csm.datasets.huggingface import IMAGE_COLUMNS, LABEL_COLUMNS, class_names_of, open_parquet, plain_batches
from csm.datasets.huggingface import SUFFIXES as PARQUET_SUFFIXES
from csm.datasets.image_folder import SUFFIXES as IMAGE_SUFFIXES
from csm.datasets.npz import KEYS
from csm.datasets.real import RealDataset
from csm.datasets.source_files import find_files, splits_of
from csm.errors import InputError
from csm.locations import location
from csm.pickles import not_plain


class Item(NamedTuple):
    """An image: its name for messages, a file or what is in one or pixels uint8 (H, W, 1 or 3), and a class's name or number."""

    name: str
    image: Path | bytes | np.ndarray
    label: str | int | None = None


@dataclass(frozen=True)
class ImageSource:
    """``count`` images, which ``read()`` gives one after the other; ``class_names`` of the numbers that are their labels, if known."""

    count: int
    read: Callable[[], Iterator[Item]]
    class_names: tuple[str, ...] = ()


class Batch(NamedTuple):
    """Decoded images: those that could be read, uint8 (M, H, W, C), in the order of the items without an error."""

    items: list[Item]
    errors: list[InputError | None]
    images: torch.Tensor


def decoded(items: Iterable[Item], shape: tuple[int, int, int], size: int) -> Iterator[Batch]:
    """``items`` in batches of ``size``, as a model of images ``shape`` (height, width, channels) takes them.

    Files are decoded in as many threads as there are cores (Pillow lets others work meanwhile), one batch ahead of the caller.
    """
    rest = iter(items)

    def decode(item: Item) -> np.ndarray | InputError:
        try:
            return decode_as(item.name, item.image, shape)
        except InputError as error:
            return error

    def collect(ahead: tuple[list[Item], list[Future[np.ndarray | InputError]]]) -> Batch:
        results = [future.result() for future in ahead[1]]
        images = [result for result in results if isinstance(result, np.ndarray)]
        pixels = np.stack(images) if images else np.empty((0, *shape), dtype=np.uint8)
        return Batch(
            ahead[0], [result if isinstance(result, InputError) else None for result in results], torch.from_numpy(pixels)
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ahead = None
        while chunk := list(islice(rest, size)):
            following = (chunk, [pool.submit(decode, item) for item in chunk])
            if ahead is not None:
                yield collect(ahead)
            ahead = following
        if ahead is not None:
            yield collect(ahead)


def images_of(path: str) -> ImageSource:
    """All images, of whatever split, of a file (an image, ``*.npz``, ``*.parquet``) or a folder (images anywhere below it, or a workspace).

    A single file that is missing or no image is found out when it is decoded.

    Raises:
        InputError: a folder without images, or a damaged npz or parquet file.
    """
    root = location(path)
    if _is_workspace(root):
        return _workspace(root, None)
    if root.is_dir():
        files = find_files(path, IMAGE_SUFFIXES)
        if not files:
            raise InputError(
                f"{path}: no image below this folder; expected {', '.join(f'*{suffix}' for suffix in IMAGE_SUFFIXES)}"
            )
        return ImageSource(len(files), lambda: (Item(str(file), file) for file in files))
    if root.suffix.lower() == ".npz":
        return _npz(root, None)
    if root.suffix.lower() in PARQUET_SUFFIXES:
        return _parquet([root], labelled=False)
    return ImageSource(1, lambda: iter([Item(path, root)]))


def labelled_images_of(path: str, split: str = "test") -> ImageSource:
    """Images with labels: of a folder with a subfolder for each class, a workspace, ``*.npz``, or parquet files as `datasets` writes them.

    Where the data tell splits apart (folders ``train``, ``val``, ``test``; arrays ``x_test``, ``y_test``; files ``test-*.parquet``), those
    of ``split``, else all.

    Raises:
        InputError: it does not exist, is damaged, is none of these, or has no image in ``split``.
    """
    root = location(path)
    if split not in tables.SPLITS:
        raise InputError(f"--split {split}: unknown; one of {', '.join(tables.SPLITS)}")
    if _is_workspace(root):
        return _workspace(root, split)
    if not root.exists():
        raise InputError(
            f"{path}: does not exist; expected a folder with a subfolder for each class, *.npz, *.parquet or a workspace"
        )
    if root.suffix.lower() == ".npz":
        return _npz(root, split)
    files = find_files(path, PARQUET_SUFFIXES)
    if root.is_dir() and not files:
        return _class_folders(root, split)
    if not all(file.suffix.lower() in PARQUET_SUFFIXES for file in files):
        raise InputError(f"{path}: expected a folder with a subfolder for each class, *.npz, *.parquet or a workspace")
    of_split = [file for file, part in zip(files, splits_of(files), strict=True) if part == split]
    if len(files) > 1 and not of_split and set(splits_of(files)) != {"train"}:
        raise InputError(f"{path}: no parquet file of split {split!r}; choose another with --split")
    return _parquet(of_split or files, labelled=True)


def _is_workspace(root: Path) -> bool:
    return (root / "dataset.json").is_file() and (root / "real").is_dir()


def _workspace(root: Path, split: str | None) -> ImageSource:
    info = RealDataset.load_info(root)
    path, total = root / "real" / "part-00000.parquet", sum(info.counts.values())

    def read() -> Iterator[Item]:
        for first in range(0, total, tables.ROW_GROUP):
            frame = tables.read(path, tables.REAL, rows=(first, tables.ROW_GROUP))
            for row in frame.iter_rows(named=True):
                if split in (None, row["split"]):
                    yield Item(f"{path} image {row['image_id']}", _pixels(row["image"], info.shape, path), row["label"])

    return ImageSource(total if split is None else info.counts[split], read, info.class_names)


def _pixels(content: bytes, shape: tuple[int, int, int], path: Path) -> np.ndarray:
    if len(content) != np.prod(shape):
        raise InputError(f"{path}: expected {np.prod(shape)} bytes for each image of shape {shape}, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _class_folders(root: Path, split: str) -> ImageSource:
    parts = [name for name in tables.SPLITS if (root / name).is_dir()]
    if parts and split not in parts:
        raise InputError(f"{root}: no folder {split}; choose one of {', '.join(parts)} with --split")
    folder = root / split if parts else root
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    files = [(directory.name, file) for directory in classes for file in find_files(str(directory), IMAGE_SUFFIXES)]
    if not files:
        raise InputError(f"{folder}: no image in a subfolder; expected a subfolder for each class, with images")
    return ImageSource(len(files), lambda: (Item(str(file), file, label) for label, file in files))


def _parquet(files: Sequence[Path], labelled: bool) -> ImageSource:
    opened = [open_parquet(file) for file in files]
    if opened[0].schema_arrow.names == list(tables.REAL):
        root = files[0].resolve().parent.parent
        if not _is_workspace(root):
            raise InputError(f"{files[0]}: images of a workspace without its dataset.json; give the workspace instead")
        return _workspace(root, None)
    columns = []
    for file, table in zip(files, opened, strict=True):
        names = table.schema_arrow.names
        image = next((name for name in IMAGE_COLUMNS if name in names), None)
        label = next((name for name in LABEL_COLUMNS if name in names), None) if labelled else ""
        if image is None or label is None:
            missing = IMAGE_COLUMNS if image is None else LABEL_COLUMNS
            raise InputError(f"{file}: no column {' or '.join(missing)} among {', '.join(names)}: rename the one that holds them")
        columns.append([image, label] if label else [image])

    def read() -> Iterator[Item]:
        for file, table, chosen in zip(files, opened, columns, strict=True):
            row = 0
            for batch in plain_batches(file, table, chosen):
                images, *known = (batch.column(name).to_pylist() for name in chosen)
                labels = known[0] if known else [None] * len(images)
                for image, label in zip(images, labels, strict=True):
                    content = image.get("bytes") if isinstance(image, dict) else image
                    yield Item(f"{file} row {row}", content if isinstance(content, bytes) else b"", label)
                    row += 1

    names = class_names_of(files[0], opened[0], "") if labelled else ()
    return ImageSource(sum(table.metadata.num_rows for table in opened), read, names)


def _npz(file: Path, split: str | None) -> ImageSource:
    arrays = _arrays(file)
    pairs = {part: next((keys for keys in KEYS[part] if keys[0] in arrays), None) for part in tables.SPLITS}
    chosen = {part: keys for part, keys in pairs.items() if keys is not None}
    if not chosen:
        raise InputError(f"{file}: no images; expected arrays images, x_test or test_images (and labels, y_test or test_labels)")
    if split is not None and split in chosen:
        chosen = {split: chosen[split]}
    elif split is not None and chosen.get("train", ("",))[0] != "images":
        raise InputError(f"{file}: no images and labels of split {split!r}; found {', '.join(arrays) or 'none'}")
    for image_key, label_key in chosen.values():
        images = arrays[image_key] = arrays[image_key][..., None] if arrays[image_key].ndim == 3 else arrays[image_key]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
            raise InputError(
                f"{file}: {image_key} is {images.dtype} of shape {images.shape}; expected uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
            )
        labels = arrays.get(label_key)
        if labels is None and split is None:
            continue
        if labels is None or labels.size != len(images) or labels.dtype.kind not in "iuU":
            what = "is missing" if labels is None else f"is {labels.dtype} of shape {labels.shape}"
            raise InputError(f"{file}: {label_key} {what}; expected a whole number or name for each of {len(images)} images")

    def read() -> Iterator[Item]:
        for image_key, label_key in chosen.values():
            labels = arrays[label_key].ravel().tolist() if label_key in arrays else [None] * len(arrays[image_key])
            for row, (image, label) in enumerate(zip(arrays[image_key], labels, strict=True)):
                yield Item(f"{file} {image_key}[{row}]", image, label)

    names = tuple(map(str, arrays["class_names"].tolist())) if "class_names" in arrays else ()
    return ImageSource(sum(len(arrays[image_key]) for image_key, _ in chosen.values()), read, names)


def _arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that may be images, labels or class names; pickled ones are refused."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            wanted = {"class_names", *(key for pairs in KEYS.values() for pair in pairs for key in pair)}
            return {key: arrays[key] for key in arrays if key in wanted}
    except FileNotFoundError:
        raise InputError(f"{file}: does not exist") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise InputError(f"{file}: {not_plain(file, error)}") from None
