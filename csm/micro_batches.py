"""Rows that go through a network together: as many as are asked for, or as the memory of the device holds."""

import logging
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import polars as pl
import torch

from csm.errors import InputError

T = TypeVar("T")

logger = logging.getLogger(__name__)

# What torch says where it does not raise torch.OutOfMemoryError: the CPU's allocator, and cuBLAS, which allocates by itself.
_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

_most = sys.maxsize  # rows that this process has learnt to fit; the device and the model of a worker do not change


def in_micro_batches(rows: pl.DataFrame, size: int, work: Callable[[pl.DataFrame], T], purpose: str = "mixing") -> Iterator[T]:
    """``work`` on consecutive slices of ``rows``, in order, each row once.

    A slice has ``size`` rows until the device runs out of memory; then half as many, again and again, for the rest of the process.

    Args:
        rows: any table.
        size: rows of a slice, at most.
        work: slice -> what it gives, never None. It is called again, with fewer rows, after it ran out of memory.
        purpose: a key of ``_SETTINGS``, for messages.

    Raises:
        InputError: not even one row fits.
    """
    start = 0
    while start < len(rows):
        batch = rows.slice(start, min(size, _most))
        result = _attempt(work, batch)
        if result is None:
            _halve(len(batch), purpose)
            continue
        yield result
        start += len(batch)


def _attempt(work: Callable[[pl.DataFrame], T], batch: pl.DataFrame) -> T | None:
    """``work(batch)``, or None if the memory does not suffice. When this returns, no traceback holds the tensors of the attempt."""
    try:
        return work(batch)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _MESSAGES):
            return None
        raise


_SETTINGS = {"mixing": ("resources.mix", "mix.batch_size"), "annotating": ("resources.annotate", "batch_size of the encoder")}


def _halve(rows: int, purpose: str) -> None:
    """Remember that ``rows`` rows do not fit."""
    global _most
    workers, batch = _SETTINGS[purpose]
    if rows == 1:
        raise InputError(
            f"{purpose}: a single image does not fit the memory of the device; "
            f"put fewer workers on it ({workers}) or use one with more memory"
        )
    if _most == sys.maxsize:
        logger.warning("%s: %d rows do not fit the memory of the device, going on with fewer (%s)", purpose, rows, batch)
    _most = rows // 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what is left there lies in pieces of the larger size
