"""Scores that need no bins, and the checks of the arguments that all metrics share."""

import torch
from torch import Tensor

# Rows of a bfloat16 softmax sum to 1 within 0.3 % (measured, K up to 1000); logits, percentages or sigmoids
# passed by mistake do not.
SUM_TOLERANCE = 1e-2
# Averaging float32 softmaxes (an ensemble) can round a certain prediction to just above 1.
ONE_TOLERANCE = 1e-6
# Numbers that are copied at a time, 4 MiB in float64, which caches hold: all of 100,000 images and 1,000 classes are 800 MB.
BLOCK = 2**19


def accuracy(probs: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose most probable class is the label; ties go to the lowest class index.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.

    Returns:
        0-dim float64 in [0, 1].

    Raises:
        ValueError: see :func:`check_probs`.
    """
    check_probs(probs, labels)
    return (probs.argmax(dim=1) == labels.long()).double().mean()


def nll(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood ``-log p_y`` in nats (the logarithmic score; Good, 1952).

    A label of probability exactly 0 makes the score inf, as the definition says: a clamp would replace the
    worst possible prediction by a number that depends on the clamp. A softmax underflows to such zeros while
    its logits are finite; from logits, use :func:`nll_from_log_probs`, which stays finite and exact (as
    :func:`csm.metrics.evaluate` does).

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.

    Returns:
        0-dim float64 in [0, inf].

    Raises:
        ValueError: see :func:`check_probs`.
    """
    check_probs(probs, labels)
    picked = probs.gather(1, labels.long()[:, None]).double()
    return picked.clamp(max=1).log().abs().mean()  # abs: a sign would turn 0 into -0.0


def nll_from_log_probs(log_probs: Tensor, labels: Tensor) -> Tensor:
    """:func:`nll` from log-probabilities, exact where the probabilities underflow.

    Args:
        log_probs: (N, K), floating point, <= 0 (a log-softmax; -inf allowed).
        labels: (N,), integer, in 0..K-1.

    Returns:
        0-dim float64 in [0, inf].

    Raises:
        ValueError: shapes or dtypes do not match, labels out of range, or log_probs is nan or positive.
    """
    _check_pair(log_probs, labels, "log_probs")
    if not bool((log_probs <= ONE_TOLERANCE).all()):
        raise ValueError(f"log_probs must be <= 0 without nan, got a maximum of {log_probs.max().item()}")
    return log_probs.gather(1, labels.long()[:, None]).double().clamp(max=0).abs().mean()


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples of ``sum_k (p_k - 1[k = y])^2`` (Brier, 1950, eq. 2: summed over the classes).

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.

    Returns:
        0-dim float64 in [0, 2].

    Raises:
        ValueError: see :func:`check_probs`.
    """
    check_probs(probs, labels)
    rows = block_rows(probs)
    per_sample = torch.empty(len(probs), dtype=torch.float64, device=probs.device)
    for p, y, part in zip(probs.split(rows), labels.long().split(rows), per_sample.split(rows), strict=True):
        target = torch.zeros_like(p, dtype=torch.float64).scatter_(1, y[:, None], 1.0)
        part.copy_((p.double() - target).square().sum(dim=1))
    return per_sample.mean()


def block_rows(scores: Tensor) -> int:
    """How many rows of ``scores`` (N, K) to handle at a time, so that a copy of them is small."""
    return max(1, BLOCK // scores.shape[1])


def check_probs(probs: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless probs (N, K) is a distribution per row and labels (N,) integers in 0..K-1."""
    _check_pair(probs, labels, "probs")
    low, high = (bound.item() for bound in probs.aminmax())
    if not (low >= 0 and high <= 1 + ONE_TOLERANCE):
        raise ValueError(f"probs must lie in [0, 1] without nan, got values from {low} to {high}")
    off = max((p.double().sum(dim=1) - 1).abs().max().item() for p in probs.split(block_rows(probs)))
    if off > SUM_TOLERANCE:
        raise ValueError(f"rows of probs must sum to 1, got one that is off by {off:.3g}")


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless logits is finite floating point (N, K) and labels integer (N,) in 0..K-1."""
    _check_pair(logits, labels, "logits")
    finite = logits.isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(f"logits must be finite, got nan or inf in {bad} of {len(logits)} rows")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless 0 < temperature < inf."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")


def _check_pair(scores: Tensor, labels: Tensor, name: str) -> None:
    if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(f"{name} must have shape (N, K) with N >= 1 and K >= 2, got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {scores.dtype}")
    n, k = scores.shape
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape ({n},) to match {name}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    low, high = (int(bound) for bound in labels.long().aminmax())
    if low < 0 or high >= k:
        raise ValueError(f"labels must lie in 0..{k - 1}, got values from {low} to {high}")
