"""Telling images of the training distribution (inside) from others (outside) by a score: measures and scores.

Hendrycks & Gimpel, "A baseline for detecting misclassified and out-of-distribution examples", ICLR 2017 (AUROC, AUPR, largest
softmax); Liang et al., "Enhancing the reliability of out-of-distribution image detection", ICLR 2018 (FPR at 95 % TPR).

Every measure is ``(inside_scores, outside_scores) -> 0-dim float64``, a fraction, of scores that are higher for what looks more
like the training data:

* inside_scores: (N,), floating point, N > 0, without nan.
* outside_scores: (M,), the same, M > 0.

Inside images are the positive ones. ValueError: a tensor has another shape or dtype, is empty, or holds nan.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from csm.metrics.scores import block_rows


def auroc(inside_scores: Tensor, outside_scores: Tensor) -> Tensor:
    """Area under the ROC curve: the probability that an inside image scores higher than an outside one; ties count half."""
    inside, outside = _sorted(inside_scores, outside_scores)
    below, not_above = (torch.searchsorted(outside, inside, side=side).double() for side in ("left", "right"))
    return (below + not_above).mean() / (2 * len(outside))


def aupr(inside_scores: Tensor, outside_scores: Tensor) -> Tensor:
    """Area under the precision-recall curve with inside images as the positive ones, as average precision.

    ``sum_n (recall_n - recall_{n-1}) precision_n`` over all thresholds, without interpolation: the mean over inside images of
    the precision at their score. It depends on the share of inside images: compare values for the same two sets only.
    """
    inside, outside = _sorted(inside_scores, outside_scores)
    true, false = (len(scores) - torch.searchsorted(scores, inside) for scores in (inside, outside))  # at or above it
    return (true.double() / (true + false)).mean()


def fpr95(inside_scores: Tensor, outside_scores: Tensor) -> Tensor:
    """Share of outside images that pass at the highest threshold that at least 95 % of the inside images pass; lower is better."""
    inside, outside = _sorted(inside_scores, outside_scores)
    passing = -(-95 * len(inside) // 100)  # ceil, in integers
    return (outside >= inside[len(inside) - passing]).double().mean()


def max_softmax(log_probs: Tensor) -> Tensor:
    """Probability of the most probable class, in [1/K, 1] (Hendrycks & Gimpel, ICLR 2017).

    Args:
        log_probs: (N, K), floating point, a log-softmax (-inf allowed).

    Returns:
        (N,), float64, higher for what looks more like the training data.

    Raises:
        ValueError: log_probs has another shape or dtype, or holds nan.
    """
    _check_log_probs(log_probs)
    return log_probs.max(dim=1).values.double().exp()


def negative_entropy(log_probs: Tensor) -> Tensor:
    """``sum_k p_k log p_k`` in nats, in [-log K, 0]; arguments, result and errors as :func:`max_softmax`."""
    _check_log_probs(log_probs)
    return torch.cat([-torch.special.entr(rows.double().exp()).sum(dim=1) for rows in log_probs.split(block_rows(log_probs))])


def _sorted(inside_scores: Tensor, outside_scores: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in (("inside_scores", inside_scores), ("outside_scores", outside_scores)):
        if scores.ndim != 1 or len(scores) == 0 or not scores.is_floating_point() or bool(scores.isnan().any()):
            raise ValueError(
                f"{name} must be floating point (N,), N > 0, without nan, got {scores.dtype} {tuple(scores.shape)}"
                f"{' with nan' if bool(scores.isnan().any()) else ''}"
            )
    return inside_scores.double().sort().values, outside_scores.double().sort().values


def _check_log_probs(log_probs: Tensor) -> None:
    if log_probs.ndim != 2 or 0 in log_probs.shape or not log_probs.is_floating_point() or bool(log_probs.isnan().any()):
        raise ValueError(
            f"log_probs must be floating point (N, K), not empty, without nan, got {log_probs.dtype} {tuple(log_probs.shape)}"
            f"{' with nan' if bool(log_probs.isnan().any()) else ''}"
        )


OOD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"auroc": auroc, "aupr": aupr, "fpr95": fpr95}
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"max-softmax": max_softmax, "entropy": negative_entropy}
