"""The `real` table and what is known of it: the form that every data set takes."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import torch
from pydantic import Field

from csm import storage, tables
from csm.errors import InputError
from csm.generators import ExactGenerator, load_truth
from csm.locations import remove

# The ranges of the sources' settings, see ``csm.parameters.check_parameters``.
Seed = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

CHUNK = 256  # images that are copied at once: bounds the memory beside the images and the table


@dataclass(frozen=True)
class DatasetInfo:
    """What ``dataset.json`` holds.

    ``shape`` is (height, width, channels); ``mean`` and ``std`` are per channel in units of 1/255 (range [0, 1]), computed once from
    the train split and used for every split; ``counts`` is images per split; ``digest`` identifies the pixels, labels and splits.
    """

    name: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, int]
    digest: str

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class RealDataset:
    """A `real` table with its info. ``truth``: the law that its images were drawn from, where that is known."""

    info: DatasetInfo
    frame: pl.DataFrame
    truth: ExactGenerator | None = None

    def split(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images uint8 (N, C, H, W) and labels int64 (N,) of split ``name``, in order of image_id."""
        rows = self.frame.filter(pl.col("split") == name).sort("image_id")
        labels = torch.from_numpy(rows["label"].to_numpy().astype(np.int64))
        return tables.to_images(rows["image"], self.info.shape), labels

    def save(self, directory: Path) -> None:
        """Write ``truth/`` if there is one, ``real/part-00000.parquet`` and then ``dataset.json`` below ``directory``."""
        if self.truth is not None:
            self.truth.save(directory / "truth")
        else:  # of the data set that was there before
            remove(directory / "truth")
        tables.write(self.frame, directory / "real" / "part-00000.parquet", tables.REAL)
        storage.write_json(directory / "dataset.json", asdict(self.info))

    @staticmethod
    def load_info(directory: Path) -> DatasetInfo:
        """Read the info alone."""
        return storage.read_record(directory / "dataset.json", DatasetInfo)

    @classmethod
    def load(cls, directory: Path, splits: Collection[str] = tables.SPLITS) -> "RealDataset":
        """Read what ``save`` wrote; of the table only the rows of ``splits``, the images of others are never all in memory."""
        info = cls.load_info(directory)
        path = directory / "real" / "part-00000.parquet"
        if set(splits) == set(tables.SPLITS):
            frame = tables.read(path, tables.REAL)
        else:
            firsts = range(0, sum(info.counts.values()), tables.ROW_GROUP)
            groups = (tables.read(path, tables.REAL, rows=(first, tables.ROW_GROUP)) for first in firsts)
            frame = pl.concat([group.filter(pl.col("split").is_in(splits)) for group in groups])
        return cls(info, frame, load_truth(directory / "truth"))


def build(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    splits: np.ndarray,
    class_names: Sequence[str],
) -> RealDataset:
    """Make a `real` table from arrays and compute its statistics from the train split. Takes about twice the memory of ``images``.

    Args:
        name: of the data set.
        images: uint8 (N, H, W, C).
        labels: integers (N,) in 0..K-1.
        splits: strings (N,), each "train", "val" or "test".
        class_names: K names.

    Raises:
        InputError: fewer than two classes, a label that is none of them, a class without a training image, or an empty split.
    """
    n_classes = len(class_names)
    if n_classes < 2:
        raise InputError(f"data set {name!r} has {n_classes} class ({', '.join(class_names)}): at least 2 are needed to mix")
    outside = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(outside):
        raise InputError(
            f"data set {name!r}: image {outside[0]} has label {labels[outside[0]]}; expected 0 to {n_classes - 1}, "
            f"as there are {n_classes} classes"
        )
    for split in tables.SPLITS:
        if not (splits == split).any():
            raise InputError(
                f"data set {name!r} has no image in split {split!r}: give it more images, or change data.val and data.test"
            )
    missing = sorted(set(range(n_classes)) - set(labels[splits == "train"].tolist()))
    if missing:
        raise InputError(f"data set {name!r}: class {class_names[missing[0]]!r} has no training image")
    frame = pl.DataFrame(
        {
            "image_id": np.arange(len(images), dtype=np.uint32),
            "split": pl.Series(splits.tolist(), dtype=tables.SPLIT),
            "label": labels.astype(np.uint16),
            "image": pl.concat(
                [
                    pl.Series([image.tobytes() for image in images[first : first + CHUNK]], dtype=pl.Binary())
                    for first in range(0, len(images), CHUNK)
                ]
            ),
        }
    )
    mean, std = _statistics(images, np.flatnonzero(splits == "train"))
    pixels = np.ascontiguousarray(images).reshape(-1).data
    content = (pixels, labels.astype(np.uint16).tobytes(), "".join(splits.tolist()).encode())
    info = DatasetInfo(
        name=name,
        shape=(images.shape[1], images.shape[2], images.shape[3]),
        class_names=tuple(class_names),
        mean=mean,
        std=std,
        counts={split: int((splits == split).sum()) for split in tables.SPLITS},
        digest=storage.bytes_digest(*content),
    )
    return RealDataset(info, tables.check(frame, tables.REAL, name))


def _statistics(images: np.ndarray, rows: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over ``images[rows]`` in units of 1/255, from exact counts of the 256 levels."""
    channels = range(images.shape[3])
    counts = np.zeros((len(channels), 256), dtype=np.int64)
    for first in range(0, len(rows), CHUNK):
        part = images[rows[first : first + CHUNK]]
        counts += [np.bincount(part[..., channel].ravel(), minlength=256) for channel in channels]
    levels = np.arange(256)
    number = int(counts[0].sum())
    totals, squares = (counts @ levels).tolist(), (counts @ levels**2).tolist()
    # Python's whole numbers have no end. One level is the smallest spread that 8 bits can hold; a constant channel would divide by 0.
    spreads = [
        max(math.sqrt((number * square - total**2) / number**2), 1.0) for total, square in zip(totals, squares, strict=True)
    ]
    return tuple(total / (255 * number) for total in totals), tuple(spread / 255 for spread in spreads)


def with_truth(dataset: RealDataset, truth: ExactGenerator) -> RealDataset:
    """``dataset`` with the law that its images were drawn from, which its digest then covers."""
    tensors = [tensor.cpu().contiguous().numpy().tobytes() for _, tensor in sorted(truth.state_dict().items())]
    digest = storage.bytes_digest(dataset.info.digest.encode(), *tensors)
    return replace(dataset, info=replace(dataset.info, digest=digest), truth=truth)


def stratified_splits(labels: np.ndarray, val: float, test: float, seed: int) -> np.ndarray:
    """Assign each of N labels to "train", "val" or "test" at random, class by class.

    ``val`` and ``test`` are fractions of each class in [0, 1); every class keeps at least one training image. A pure function of
    the labels and ``seed``.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise InputError(f"data.val, data.test: expected fractions whose sum is below 1, got {val} and {test}")
    generator = np.random.default_rng(seed)
    splits = np.full(len(labels), "train", dtype="<U5")
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        n_val, n_test = round(val * len(members)), round(test * len(members))
        n_val, n_test = min(n_val, len(members) - 1), min(n_test, max(len(members) - 1 - n_val, 0))
        splits[members[:n_val]] = "val"
        splits[members[n_val : n_val + n_test]] = "test"
    return splits


def complete_splits(
    labels: np.ndarray, splits: np.ndarray, given: Collection[str], val: float, test: float, seed: int
) -> np.ndarray:
    """``splits`` (N,) with "val" and "test" cut from "train", stratified and seeded, as far as they are not among the ``given`` ones."""
    complete, train = splits.astype("<U5"), splits == "train"
    complete[train] = stratified_splits(labels[train], 0.0 if "val" in given else val, 0.0 if "test" in given else test, seed)
    return complete
