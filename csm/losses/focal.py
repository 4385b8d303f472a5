"""Focal losses: cross-entropy that weighs each image by how far its class is from certain. Signature and notation as in ``hard``.

A loss defined by the class y of an image is linear in the target: sum_y t_y loss(p, y). Where p_y rounds to 1 loss and gradient are 0.
"""

import math
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field

from csm.losses.loss import Loss, NonNegative, Positive, widen


def focal(logits: torch.Tensor, target: torch.Tensor, gamma: NonNegative = 3.0) -> torch.Tensor:
    """-sum_y t_y (1 - p_y)^gamma log p_y, gamma >= 0 (Lin et al. 2017, eq. 4; gamma = 3 for calibration: Mukhoti et al. 2020)."""
    log_probs = F.log_softmax(widen(logits), dim=1)
    return _weighted(_power(-torch.expm1(log_probs), gamma), log_probs, target)


def flsd_53(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Focal with gamma = 5 where p_y < 0.2, else 3 (FLSD-53 of Mukhoti et al. 2020). It jumps at p_y = 0.2."""
    log_probs = F.log_softmax(widen(logits), dim=1)
    gamma = torch.where(log_probs.exp() < 0.2, 5.0, 3.0)
    return _weighted(_power(-torch.expm1(log_probs), gamma), log_probs, target)


def dual_focal(logits: torch.Tensor, target: torch.Tensor, gamma: NonNegative = 5.0) -> torch.Tensor:
    """-sum_y t_y (1 - p_y + p_j)^gamma log p_y, p_j the largest of the p_k < p_y, or 0 if there is none (Tao et al. 2023).

    A class as probable as y is not below it. Where p_j changes from one class to another the gradient jumps.
    """
    log_probs = F.log_softmax(widen(logits), dim=1)
    probs = log_probs.exp()
    ascending = probs.sort(dim=1).values
    n_below = torch.searchsorted(ascending.detach(), probs.detach())  # (N, K), classes that are strictly less probable
    below = torch.where(n_below > 0, ascending.gather(1, (n_below - 1).clamp_min(0)), 0.0)
    return _weighted(_power(below - torch.expm1(log_probs), gamma), log_probs, target)


class AdaFocal(Loss):
    """Focal whose gamma follows the calibration of the validation split (Ghosh et al. 2022).

    The range of confidence is cut into bins, each with a gamma of its own, and an image's gamma is that of the bin of p_y:
    -(1 - p_y)^gamma log p_y if gamma > 0, inverse focal -(1 + p_y)^|gamma| log p_y if gamma < 0. After each epoch the bins are cut anew,
    as equal-mass bins of the validation confidences max_k p_k, and with E_b = mean confidence - accuracy of bin b

        gamma_b <- gamma_b exp(rate E_b) if gamma_b > 0, gamma_b exp(-rate E_b) if gamma_b < 0;

    so overconfidence always raises gamma. A gamma nearer to 0 than ``switch`` jumps to ``switch`` on the other side of it. A bin
    keeps its gamma from epoch to epoch by its rank, though its borders move; a bin without an image (fewer images than bins) keeps
    gamma and is never used.

    Args:
        rate: lambda of the paper.
        bins: number of bins.
        gamma: of every bin before the first epoch has ended.
        switch: least absolute value of gamma.
        gamma_min, gamma_max: gamma is clipped to these.
    """

    gamma: torch.Tensor
    edges: torch.Tensor

    def __init__(
        self,
        rate: Positive = 1.0,
        bins: Annotated[int, Field(ge=1, le=1000)] = 15,
        gamma: Positive = 1.0,
        switch: Positive = 0.2,
        gamma_min: Annotated[float, Field(lt=0, allow_inf_nan=False)] = -2.0,
        gamma_max: Positive = 20.0,
    ) -> None:
        super().__init__()
        self.rate, self.switch, self.gamma_min, self.gamma_max = rate, switch, gamma_min, gamma_max
        self.register_buffer("gamma", torch.full((bins,), float(gamma)))
        self.register_buffer("edges", torch.arange(1, bins) / bins)  # bin b holds edges[b-1] <= p < edges[b]

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        log_probs = F.log_softmax(widen(logits), dim=1)
        probs = log_probs.exp()
        gamma = self.gamma.to(probs.dtype)[torch.bucketize(probs.detach(), self.edges.to(probs.dtype), right=True)]
        base = torch.where(gamma > 0, -torch.expm1(log_probs), 1 + probs)
        return _weighted(_power(base, gamma.abs()), log_probs, target)

    def observe(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        # On the CPU: the sums must not depend on the device, or a resumed training could go another way.
        confidence, predicted = logits.detach().cpu().double().softmax(dim=1).max(dim=1)
        confidence, order = confidence.sort(stable=True)
        gap = confidence - (predicted == labels.cpu())[order].double()
        gamma = self.gamma.tolist()
        starts = [-(-number * len(gap) // len(gamma)) for number in range(len(gamma) + 1)]  # sizes that differ by at most one
        for number, (start, stop) in enumerate(pairwise(starts)):
            if start < stop:
                gamma[number] = self._next(gamma[number], float(gap[start:stop].mean()))
        self.gamma.copy_(torch.tensor(gamma))
        self.edges.copy_(
            F.pad(confidence, (0, 1), value=math.inf)[starts[1:-1]]
        )  # with few images the last bins begin behind all

    def _next(self, gamma: float, gap: float) -> float:
        sign = math.copysign(1.0, gamma)
        gamma *= math.exp(sign * self.rate * gap)
        if abs(gamma) < self.switch:
            gamma = -sign * self.switch
        return min(max(gamma, self.gamma_min), self.gamma_max)


def _power(base: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    # 0 ** gamma has no gradient for gamma < 1, and a float32 softmax soon saturates to p = 1.
    return base.clamp_min(torch.finfo(base.dtype).tiny) ** gamma


def _weighted(weight: torch.Tensor, log_probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * weight * log_probs).sum(dim=1).mean()
