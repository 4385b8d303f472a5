"""Losses for labelled images: ``loss(logits, target, **parameters) -> scalar``.

``logits`` is float (N, K); ``target`` float (N, K) holds one row of class probabilities per image: one-hot for a label, mixed for a
pixel mix. With p = softmax(logits) and target t, every loss is the mean over the batch.
"""

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-sum_k t_k log p_k."""
    return F.cross_entropy(logits, target)


def label_smoothing(logits: torch.Tensor, target: torch.Tensor, alpha: float = 0.05) -> torch.Tensor:
    """(1 - alpha) CE(t) + alpha CE(uniform), alpha in [0, 1] (Szegedy et al. 2016, section 7)."""
    return F.cross_entropy(logits, target, label_smoothing=alpha)


def focal(logits: torch.Tensor, target: torch.Tensor, gamma: float = 3.0) -> torch.Tensor:
    """-sum_k t_k (1 - p_k)^gamma log p_k, gamma >= 0 (Lin et al. 2017, eq. 4; gamma = 3 for calibration: Mukhoti et al. 2020).

    At p_k = 1 the term is 0.
    """
    log_probs = F.log_softmax(logits, dim=1)
    # 0 ** gamma has no gradient for gamma < 1, and a float32 softmax soon saturates to p = 1.
    weight = (-torch.expm1(log_probs)).clamp_min(torch.finfo(log_probs.dtype).tiny) ** gamma
    return -(target * weight * log_probs).sum(dim=1).mean()
