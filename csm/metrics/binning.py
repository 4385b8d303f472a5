"""The one binning that every binned metric and plot uses.

Two schemes, both of which keep every sample:

* ``equal-width``: bin b is the interval (b/n_bins, (b+1)/n_bins] (Guo et al., ICML 2017, sec. 2); a
  confidence of exactly 0 joins the first bin.
* ``equal-mass``: samples sorted by confidence, cut into n_bins groups whose sizes differ by at most one
  (adaptive binning; Nguyen & O'Connor, EMNLP 2015).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["equal-width", "equal-mass"]


@dataclass(frozen=True, eq=False)
class Bins:
    """What a bin holds. Every field is float64 of shape (..., n_bins); an empty bin is 0 in all three.

    Empty bins are 0 and not nan so that count-weighted sums need no mask; ``count == 0`` tells them apart.
    """

    count: Tensor  # samples in the bin; sums to N over the last dimension
    confidence: Tensor  # mean confidence, in [0, 1]
    outcome: Tensor  # mean outcome, in [0, 1]: the accuracy when the outcome is "the prediction was correct"


def bin_samples(confidence: Tensor, outcome: Tensor, n_bins: int = 15, scheme: Scheme = "equal-width") -> Bins:
    """Group samples by confidence; leading dimensions (classes, say) are binned independently of each other.

    Args:
        confidence: (..., N), floating point, in [0, 1]. Compared with the bin edges in float64.
        outcome: same shape, bool or real, in [0, 1].
        n_bins: number of bins, > 0. With ``equal-mass`` and N < n_bins, each sample has a bin of its own.
        scheme: ``equal-width`` or ``equal-mass``. Equal confidences can fall into neighbouring equal-mass
            groups, where the order of the input decides (the sort is stable).

    Raises:
        ValueError: n_bins or scheme is none of these; shapes differ; N is 0; a value is nan or outside
            [0, 1].
    """
    check_n_bins(n_bins)
    confidence, outcome = check_samples(confidence, outcome)
    if scheme == "equal-width":
        index = bin_indices(confidence, n_bins)
    elif scheme == "equal-mass":
        index = _equal_mass(confidence, n_bins)
    else:
        raise ValueError(f"scheme must be 'equal-width' or 'equal-mass', got {scheme!r}")

    # Not bincount: scatter_add takes leading dimensions, and is deterministic on CUDA if torch is told to be.
    zeros = confidence.new_zeros((*confidence.shape[:-1], n_bins))
    count = zeros.scatter_add(-1, index, torch.ones_like(confidence))
    divisor = count.clamp(min=1)  # the sums of an empty bin are 0, and stay 0
    return Bins(
        count,
        zeros.scatter_add(-1, index, confidence) / divisor,
        zeros.scatter_add(-1, index, outcome) / divisor,
    )


def check_n_bins(n_bins: int) -> None:
    """Raise ValueError unless n_bins is an int > 0."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"n_bins must be an int > 0, got {n_bins!r}")


def check_samples(confidence: Tensor, outcome: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, or raise ValueError unless they have one shape (..., N), N > 0, and values in [0, 1]."""
    if confidence.ndim < 1 or confidence.shape != outcome.shape:
        raise ValueError(
            f"confidence and outcome must have one shape (..., N), got {tuple(confidence.shape)} and {tuple(outcome.shape)}"
        )
    if confidence.numel() == 0:
        raise ValueError(f"confidence must hold at least one sample, got shape {tuple(confidence.shape)}")
    return unit_interval(confidence, "confidence"), unit_interval(outcome, "outcome")


def bin_indices(confidence: Tensor, n_bins: int) -> Tensor:
    """Index int64 in 0..n_bins-1 of the equal-width bin of each confidence float64 in [0, 1]; same shape."""
    # Inner edges only: left of the first lies bin 0 (with 0), right of the last lies the last bin (with 1).
    # Each edge is one rounded quotient, so a float64 b/n_bins lies on it; linspace misses some by an ulp.
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=confidence.device) / n_bins
    return torch.bucketize(confidence.contiguous(), edges)  # right=False: edge[i-1] < c <= edge[i]


def _equal_mass(confidence: Tensor, n_bins: int) -> Tensor:
    n = confidence.shape[-1]
    order = confidence.argsort(dim=-1, stable=True)
    group = torch.arange(n, device=confidence.device) * n_bins // n  # (N,), of each rank
    return torch.empty_like(order).scatter_(-1, order, group.expand_as(order))


def unit_interval(values: Tensor, name: str) -> Tensor:
    """``values`` in float64, checked. Written so that nan fails too."""
    low, high = (bound.item() for bound in values.double().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must lie in [0, 1] without nan, got values from {low} to {high}")
    return values.double()
