"""Noise that belongs to a row: drawn from the row's own seed, on the CPU, so that every device and every batch gets the same."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_MASK = 2**63 - 1
_FRESH = 1  # the key of noise added on the way


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise float32 (N, C, H, W), row i drawn from ``torch.Generator().manual_seed(seeds[i])``.

    Rows with equal seeds are equal: that is how all ratios of a mixed set can start from the same noise.

    Args:
        seeds: N non-negative integers below 2**63.
        shape: (C, H, W).
    """
    unique = {seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in dict.fromkeys(seeds)}
    return torch.stack([unique[seed] for seed in seeds])


def fresh_noise(seeds: Sequence[int], shape: tuple[int, int, int], step: int) -> torch.Tensor:
    """More standard normal noise float32 (N, C, H, W) for ``step`` >= 0 of a stochastic solver, row i a function of seeds[i] and step.

    Rows with equal seeds are equal, as in ``initial_noise``, and independent of it.
    """
    return initial_noise(mix_seeds(_FRESH, seeds, np.full(len(seeds), step)).tolist(), shape)


def mix_seeds(key: int, *columns: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Hash ``key`` and integer columns, row by row, to seeds int64 (N,) in [0, 2**63).

    SplitMix64 (Steele, Lea & Flood 2014, the finaliser of section 3) folded over the columns: a pure function of its arguments, fast
    for millions of rows.
    """
    state: npt.NDArray[np.uint64] = np.asarray(key, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the algorithm
        for column in columns:
            z = state * np.uint64(0x9E3779B97F4A7C15) + np.asarray(column, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return np.asarray(state & np.uint64(_MASK), dtype=np.int64)
