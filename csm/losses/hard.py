"""Losses for labelled images: ``loss(logits, target, **parameters) -> scalar``.

``logits`` is float (N, K); ``target`` float (N, K) holds one row of class probabilities per image: one-hot for a label, mixed for a
pixel mix. With p = softmax(logits) and target t, every loss is the mean over the batch, computed in float32 at least.
"""

import torch
import torch.nn.functional as F

from csm.losses.loss import NonNegative, Share, widen


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-sum_k t_k log p_k."""
    logits = widen(logits)
    return F.cross_entropy(logits, target.to(logits.dtype))


def label_smoothing(logits: torch.Tensor, target: torch.Tensor, alpha: Share = 0.05) -> torch.Tensor:
    """(1 - alpha) CE(t) + alpha CE(uniform), alpha in [0, 1] (Szegedy et al. 2016, section 7)."""
    logits = widen(logits)
    return F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=alpha)


def brier(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Expected Brier score of a label drawn from t: sum_y t_y sum_k (p_k - 1[k = y])^2 = sum_k p_k^2 - 2 p_k t_k + 1, in [0, 2].

    For a label, the score of Brier (1950). For a soft target it is ``soft.l2`` + 1 - sum_k t_k^2: the same gradient, hence the same
    training, but on the scale of the metric, so that its least value is the uncertainty of the label and not 0.
    """
    target = widen(target)
    apart = (widen(logits).softmax(dim=1) - target).square().sum(dim=1)
    return (apart + 1 - target.square().sum(dim=1)).mean()


def entropy_penalty(logits: torch.Tensor, target: torch.Tensor, weight: NonNegative = 0.1) -> torch.Tensor:
    """CE - weight H(p), H(p) = -sum_k p_k log p_k in [0, log K] (Pereyra et al. 2017). May be negative, down to -weight log K."""
    log_probs = F.log_softmax(widen(logits), dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
    return cross_entropy(logits, target) - weight * entropy
