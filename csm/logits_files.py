"""Logits and labels in a file of numpy or parquet: all that post-hoc calibration needs of a classifier."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from csm.errors import InputError
from csm.metrics.scores import SUM_TOLERANCE
from csm.pickles import not_plain

LOGITS = ("logits",)
PROBS = ("probs", "probabilities")
LABELS = ("labels", "label", "targets")


@dataclass(frozen=True)
class LogitsFile:
    """Logits float32 or float64 (N, K), finite, labels int64 (N,) in 0..K-1, and, if the file says it, the split of each row (N,)."""

    path: Path
    logits: Tensor
    labels: Tensor
    splits: tuple[str, ...] = ()

    def split(self, name: str) -> "LogitsFile":
        """The rows of split ``name``."""
        rows = torch.tensor([split == name for split in self.splits])
        return LogitsFile(self.path, self.logits[rows], self.labels[rows])


def read_logits(path: Path) -> LogitsFile:
    """Read ``*.npz`` or ``*.parquet``: (N, K) ``logits``, ``probs`` or ``probabilities``; (N,) ``labels``, ``label`` or ``targets``.

    In parquet a row holds a list of K numbers; a column ``split``, as in csm's own predictions, is read as well. Of probabilities the
    logarithm is taken, those of 0 as the smallest number of their type.

    Raises:
        InputError: the file is missing or damaged, holds pickles, lacks one of the two, or has other shapes, a number that is not finite,
            rows of probabilities that do not sum to 1, or labels that are no classes.
    """
    readers = {".npz": _npz, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: expected a file *.npz or *.parquet with logits (N, K) and labels (N,)")
    if not path.is_file():
        raise InputError(f"{path}: does not exist")
    columns = readers[path.suffix.lower()](path)
    key, scores = _one_of(columns, (*LOGITS, *PROBS), path)
    label_key, labels = _one_of(columns, LABELS, path)
    if scores.ndim != 2 or len(scores) == 0 or scores.shape[1] < 2 or scores.dtype.kind not in "fiu":
        raise InputError(f"{path}: {key} is {scores.dtype} of shape {scores.shape}; expected numbers (N, K), N > 0, K >= 2")
    scores = scores.astype(np.float64 if scores.dtype.itemsize > 4 or scores.dtype.kind != "f" else np.float32)
    bad = int((~np.isfinite(scores)).any(axis=1).sum())
    if bad:
        raise InputError(f"{path}: {key} has nan or inf in {bad} of {len(scores)} rows; remove them or repair what wrote them")
    if key in PROBS:
        scores = _logarithm(scores, key, path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != scores.shape[:1]:
        raise InputError(
            f"{path}: {label_key} is {labels.dtype} of shape {labels.shape}; expected a whole number for each of {len(scores)} rows"
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InputError(
            f"{path}: {label_key} has values from {labels.min()} to {labels.max()}; expected 0 to {scores.shape[1] - 1}, "
            f"as {key} has {scores.shape[1]} columns"
        )
    splits = tuple(map(str, columns["split"].tolist())) if "split" in columns else ()
    return LogitsFile(path, torch.from_numpy(scores), torch.from_numpy(labels.astype(np.int64)), splits)


def _logarithm(probs: np.ndarray, key: str, path: Path) -> np.ndarray:
    if probs.min() < 0 or probs.max() > 1 + 1e-6:
        raise InputError(
            f"{path}: {key} has values from {probs.min():g} to {probs.max():g}; expected 0 to 1, or name them logits"
        )
    off = float(np.abs(probs.sum(axis=1, dtype=np.float64) - 1).max())
    if off > SUM_TOLERANCE:
        raise InputError(f"{path}: a row of {key} sums to 1 only within {off:.3g}; expected probabilities of all K classes")
    logarithm: np.ndarray = np.log(np.maximum(probs, np.finfo(probs.dtype).tiny))
    return logarithm


def _one_of(columns: Mapping[str, np.ndarray], names: tuple[str, ...], path: Path) -> tuple[str, np.ndarray]:
    for name in names:
        if name in columns:
            return name, columns[name]
    raise InputError(f"{path}: no {' or '.join(names)} in it; it has {', '.join(columns) or 'nothing'}")


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            known = [key for key in arrays if key in (*LOGITS, *PROBS, *LABELS)]
            return {key: arrays[key] for key in known} or dict.fromkeys(arrays, np.empty(0))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise InputError(f"{path}: {not_plain(path, error)}") from None


def _parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: is not a whole parquet file ({reason}): write it again") from None
    return {name: _array(frame[name], path) for name in frame.columns if name in (*LOGITS, *PROBS, *LABELS, "split")} or {
        name: np.empty(0) for name in frame.columns
    }


def _array(column: pl.Series, path: Path) -> np.ndarray:
    if column.null_count():
        raise InputError(
            f"{path}: {column.name} is missing in {column.null_count()} of {len(column)} rows; remove or repair them"
        )
    if isinstance(column.dtype, pl.List):
        lengths = column.list.len().unique().to_list()
        if len(lengths) > 1:
            raise InputError(
                f"{path}: {column.name} has lists of {min(lengths)} to {max(lengths)} numbers; expected K in every row"
            )
        column = column.list.to_array(lengths[0] if lengths else 0)
    array: Any = column.to_numpy()
    return np.array(array)  # a copy that can be written to
