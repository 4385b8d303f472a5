"""How far labels and predictions are from a posterior that is known, as with ``gaussians`` data. No labels are drawn: no sampling noise."""

import math

import torch
from torch import Tensor

from csm.metrics.binning import bin_samples
from csm.metrics.calibration import mean_gap
from csm.metrics.scores import check_probs


def tv(probs: Tensor, truth: Tensor) -> float:
    """Mean total variation ``sum_k |p_k - t_k| / 2``, in [0, 1]: the most by which the probability of any event is wrong.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1: labels, or what a classifier says.
        truth: the true posterior, the same shape.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    _check(probs, truth)
    return (probs.double() - truth.double()).abs().sum(dim=1).mul(0.5).mean().item()


def compare(labels: Tensor, truth: Tensor, class_a: Tensor, class_b: Tensor, n_bins: int = 15) -> dict[str, float]:
    """Soft labels p of mixed images of classes a and b against the true posterior t.

    Args:
        labels: (N, K), floating point, rows in [0, 1] that sum to 1.
        truth: the same shape.
        class_a, class_b: (N,), integer, in 0..K-1, different in each row.
        n_bins: of ``ece``.

    Returns:
        Means over the images:

        * tv: ``sum_k |p_k - t_k| / 2``.
        * kl: ``KL(t || p) = sum_k t_k log(t_k / p_k)``, nats; inf if any p_k is 0 where t_k > 0, as with labels of two classes.
        * pair_error: ``|p_a / (p_a + p_b) - t_a / (t_a + t_b)|`` over the images where both sums are > 0; the others have no such
          ratio and do not count. nan if there is no such image.
        * outside_mass, outside_truth: ``1 - p_a - p_b`` and ``1 - t_a - t_b``.
        * entropy, entropy_truth: ``-sum_k p_k log p_k`` and ``-sum_k t_k log t_k``, nats.

        And ece: ``sum_b n_b / N |mean_b t_c - mean_b p_c|`` over equal-width bins b of p_c, c the class of largest p (ties: the lowest).

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    _check(labels, truth)
    check_probs(labels, class_a)
    check_probs(labels, class_b)
    if (class_a == class_b).any():
        raise ValueError("class_a and class_b must differ in each row")
    p, t = labels.double(), truth.double()
    pair = torch.stack([class_a, class_b], dim=1).long()
    p_pair, t_pair = p.gather(1, pair), t.gather(1, pair)
    p_sum, t_sum = p_pair.sum(dim=1), t_pair.sum(dim=1)
    both = (p_sum > 0) & (t_sum > 0)
    share_error = (p_pair[both, 0] / p_sum[both] - t_pair[both, 0] / t_sum[both]).abs()
    confidence, top = p.clamp(max=1).max(dim=1)
    bins = bin_samples(confidence, t.gather(1, top[:, None]).squeeze(1).clamp(max=1), n_bins)
    return {
        "tv": tv(labels, truth),
        "kl": (torch.xlogy(t, t) - torch.xlogy(t, p)).sum(dim=1).mean().clamp(min=0).item(),  # rounding
        "pair_error": share_error.mean().item() if both.any() else math.nan,
        "outside_mass": (1 - p_sum).clamp(min=0).mean().item(),
        "outside_truth": (1 - t_sum).clamp(min=0).mean().item(),
        "ece": mean_gap(bins).item(),
        "entropy": -torch.xlogy(p, p).sum(dim=1).mean().item(),
        "entropy_truth": -torch.xlogy(t, t).sum(dim=1).mean().item(),
    }


def _check(probs: Tensor, truth: Tensor) -> None:
    if probs.shape != truth.shape:
        raise ValueError(f"truth must have the shape of the labels, {tuple(probs.shape)}, got {tuple(truth.shape)}")
    any_class = torch.zeros(len(probs), dtype=torch.int64, device=probs.device)
    for scores in (probs, truth):
        check_probs(scores, any_class)
