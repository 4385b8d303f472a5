"""Terms that fit soft labels on mixed images: ``loss(logits, target) -> scalar``.

``logits`` is float (N, K); ``target`` float (N, K), rows q on the simplex. With p = softmax(logits), the mean over the batch, computed
in float32 at least. ``cross_entropy`` and ``brier`` are those of ``hard``, which take soft targets too.
"""

import torch
import torch.nn.functional as F

from csm.losses.loss import widen


def kl(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(q || p) = sum_k q_k log(q_k / p_k); a class with q_k = 0 adds nothing. Same gradient as ``cross_entropy``, least value 0."""
    return F.kl_div(F.log_softmax(widen(logits), dim=1), widen(target), reduction="batchmean")


def l1(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """sum_k |p_k - q_k|, in [0, 2]. Not proper: of a label drawn from q, the least expected value is at the most probable class."""
    return (widen(logits).softmax(dim=1) - target).abs().sum(dim=1).mean()


def l2(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """sum_k (p_k - q_k)^2, in [0, 2] (Luo et al. 2025, the loss of CSM on mixed images)."""
    return (widen(logits).softmax(dim=1) - target).square().sum(dim=1).mean()
