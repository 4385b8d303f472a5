"""Features of the real images, each image encoded once: a table that everything is fitted from, read in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch

from csm import tables
from csm.errors import InputError
from csm.locations import local


@dataclass(frozen=True)
class FeatureTable:
    """Part files of the `features` table of one encoder below ``directory``."""

    directory: Path

    @cached_property
    def size(self) -> int:
        """F, the length of a feature."""
        column = pl.read_parquet_schema(self._parts()[0]).get("feature")
        if not isinstance(column, pl.Array):
            raise InputError(f"{self.directory} holds no features: remove it and run csm annotate")
        return column.size

    def batches(self, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features float32 (N, F) and labels int64 (N,) of split ``split``, a part at a time, in order of image_id."""
        for part in self._parts():
            frame = tables.read(part, tables.features(self.size)).filter(pl.col("split") == split)
            if len(frame):
                features, labels = frame["feature"].to_numpy(), frame["label"].to_numpy()
                yield torch.from_numpy(features.copy()), torch.from_numpy(labels.astype(np.int64))

    def matrix(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All of ``batches(split)`` at once."""
        features, labels = zip(*self.batches(split), strict=True)
        return torch.cat(features), torch.cat(labels)

    def _parts(self) -> list[Path]:
        parts = sorted(local(self.directory).glob("part-*.parquet")) if self.directory.is_dir() else []
        if not parts:
            raise InputError(f"{self.directory} holds no features: run csm annotate")
        return parts
