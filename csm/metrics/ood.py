"""Telling images of the training distribution (inside, the positive ones) from others (outside) by a score that is higher inside."""

from collections.abc import Callable

import torch
from torch import Tensor


def auroc(inside_scores: Tensor, outside_scores: Tensor) -> Tensor:
    """The probability that an inside image scores higher than an outside one; ties count half."""
    inside, outside = inside_scores.double().contiguous(), outside_scores.double().sort().values
    below, not_above = (torch.searchsorted(outside, inside, side=side).double() for side in ("left", "right"))
    area: Tensor = (below + not_above).mean() / (2 * len(outside))
    return area


def aupr(inside_scores: Tensor, outside_scores: Tensor) -> Tensor:
    """Average precision: the mean over inside images of the precision at their score."""
    inside, outside = inside_scores.double().sort().values, outside_scores.double().sort().values
    true, false = (len(scores) - torch.searchsorted(scores, inside) for scores in (inside, outside))
    return (true.double() / (true + false)).mean()


def fpr95(inside_scores: Tensor, outside_scores: Tensor) -> Tensor:
    """Share of outside images at or above the highest threshold that at least 95 % of the inside images reach."""
    inside = inside_scores.double().sort().values
    return (outside_scores.double() >= inside[len(inside) - -(-95 * len(inside) // 100)]).double().mean()


def max_softmax(log_probs: Tensor) -> Tensor:
    """Log-probability (N,) of the most probable class, of log-probabilities (N, K)."""
    return log_probs.double().max(dim=1).values


def negative_entropy(log_probs: Tensor) -> Tensor:
    """``sum_k p_k log p_k`` (N,) of log-probabilities (N, K)."""
    entropy: Tensor = torch.special.entr(log_probs.double().exp()).sum(dim=1)
    return -entropy


OOD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"auroc": auroc, "aupr": aupr, "fpr95": fpr95}
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"max-softmax": max_softmax, "entropy": negative_entropy}
