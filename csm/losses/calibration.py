"""Losses with a calibration error of the batch in them; signature and notation as in ``hard``.

They are no means over images: the value for a batch is not that of its parts, averaged.
"""

import torch

from csm.losses.focal import focal
from csm.losses.hard import cross_entropy
from csm.losses.loss import NonNegative, widen

WIDTH = 0.4  # of MMCE's kernel


def mmce(logits: torch.Tensor, target: torch.Tensor, weight: NonNegative = 1.0) -> torch.Tensor:
    """CE + weight sqrt(1/N^2 sum_ij (r_i - c_i)(r_j - c_j) exp(-|c_i - c_j| / 0.4)), the unweighted MMCE (Kumar et al. 2018).

    c is the largest p of an image, r whether that class is right; for a soft target the chance that it is: r = t of that class. r has
    no gradient. Where the sum rounds to 0 the term and its gradient are 0: there the square root has no derivative. Memory N^2.
    """
    probs = widen(logits).softmax(dim=1)
    confidence, predicted = probs.max(dim=1)
    gap = target.gather(1, predicted[:, None])[:, 0] - confidence  # (N,)
    kernel = (-(confidence[:, None] - confidence).abs() / WIDTH).exp()  # (N, N)
    squared = (gap[:, None] * gap * kernel).mean()
    positive = squared > torch.finfo(squared.dtype).eps ** 2
    error = torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
    return cross_entropy(logits, target) + weight * error


def mdca(logits: torch.Tensor, target: torch.Tensor, weight: NonNegative = 1.0, gamma: NonNegative = 0.0) -> torch.Tensor:
    """Base + weight mean_k |mean_i p_ik - mean_i t_ik| (Hebbalaguppe et al. 2022).

    The base is ``focal`` with gamma, hence cross-entropy for gamma = 0. The frequency of a class is its mean target.
    """
    apart = (widen(logits).softmax(dim=1).mean(dim=0) - widen(target).mean(dim=0)).abs().mean()
    base = focal(logits, target, gamma) if gamma > 0 else cross_entropy(logits, target)
    return base + weight * apart
