"""Training images for the rows of a plan: mixed pixel by pixel, to start mixing from, or as they are."""

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from csm import tables
from csm.errors import InputError
from csm.noise import mix_seeds
from csm.planning import nearer_a

FIRST, SECOND = 2, 3  # the keys of what is drawn of class_a and of class_b; key 1 is that of fresh noise


class TrainingImages:
    """The train split of a `real` table, in order of image_id. Memory holds the labels, and a row group while images are taken from it.

    Args:
        table: its file, on storage that every node sees.
        shape: (H, W, C) of the images.
    """

    def __init__(self, table: Path, shape: tuple[int, int, int]) -> None:
        self._table, self._shape = table, shape

    @cached_property
    def _index(self) -> pl.DataFrame:
        """Of each image its row in the table and its label."""
        columns = ["image_id", "split", "label"]
        frame = tables.read(self._table, tables.REAL, columns).with_row_index("row")
        return frame.filter(pl.col("split") == "train").sort("image_id").select("row", "label")

    @property
    def labels(self) -> npt.NDArray[np.uint16]:
        """(N,), in order of image_id."""
        return self._index["label"].to_numpy()

    @cached_property
    def _of_class(self) -> dict[int, npt.NDArray[np.int64]]:
        """Class -> numbers of its images."""
        labels = self.labels
        return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}

    def take(self, numbers: npt.NDArray[np.integer]) -> torch.Tensor:
        """Images ``numbers`` (M,) of the split, uint8 (M, C, H, W). Of the table those row groups are read that hold one."""
        height, width, channels = self._shape
        images = torch.empty(len(numbers), channels, height, width, dtype=torch.uint8)
        if len(numbers) and int(numbers.max()) >= len(self._index):
            raise InputError(f"plan: training image {numbers.max()} of {len(self._index)}: run csm plan again")
        rows = self._index["row"].to_numpy()[numbers].astype(np.int64)
        groups = rows // tables.ROW_GROUP
        for group in np.unique(groups):
            place = np.flatnonzero(groups == group)
            first = int(group) * tables.ROW_GROUP
            column = tables.read(self._table, tables.REAL, ["image"], rows=(first, tables.ROW_GROUP))["image"]
            images[torch.from_numpy(place)] = tables.to_images(column.gather(rows[place] - first), self._shape)
        return images

    def pair(self, plan: pl.DataFrame) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers of the images that a row's seed draws, one of class_a and one of class_b, int64 (M,) each.

        Rows with equal seeds, as those of a set that shares its noise, have the same two images.
        """
        return self._drawn(plan, "class_a", FIRST), self._drawn(plan, "class_b", SECOND)

    def nearer(self, plan: pl.DataFrame) -> npt.NDArray[np.int64]:
        """Of the two images of ``pair`` the number of the one whose class has the larger share; in the middle the seed decides."""
        image_a, image_b = self.pair(plan)
        return np.where(nearer_a(plan["lam"].to_numpy(), plan["seed"].to_numpy()), image_a, image_b)

    def _drawn(self, plan: pl.DataFrame, column: str, key: int) -> npt.NDArray[np.int64]:
        classes, numbers = plan[column].to_numpy(), np.empty(len(plan), dtype=np.int64)
        draws = mix_seeds(key, plan["seed"].to_numpy())
        for label in np.unique(classes):
            of_class = self._of_class.get(int(label))
            if of_class is None:
                raise InputError(f"plan: class {label} has no training image: run csm plan again")
            rows = classes == label
            numbers[rows] = of_class[draws[rows] % len(of_class)]
        return numbers


def real_images(plan: pl.DataFrame, real: TrainingImages) -> torch.Tensor:
    """The images of rows of kind "real", uint8 (M, C, H, W)."""
    return real.take(plan["group"].to_numpy())


def pixel_mixtures(plan: pl.DataFrame, real: TrainingImages) -> torch.Tensor:
    """lam * x_a + (1 - lam) * x_b, uint8 (M, C, H, W), rounded: mixup (Zhang et al. 2018) of the two images that each row's seed draws."""
    image_a, image_b = real.pair(plan)
    share = torch.from_numpy(plan["lam"].to_numpy().copy()).double().view(-1, 1, 1, 1)
    return (share * real.take(image_a) + (1 - share) * real.take(image_b)).round().to(torch.uint8)
