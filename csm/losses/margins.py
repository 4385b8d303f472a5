"""Cross-entropy with constraints on the distances between logits; signature and notation as in ``hard``, z the logits, K >= 2."""

import torch
import torch.nn.functional as F

from csm.losses.hard import cross_entropy
from csm.losses.loss import NonNegative, widen


def mbls(logits: torch.Tensor, target: torch.Tensor, weight: NonNegative = 0.1, margin: NonNegative = 10.0) -> torch.Tensor:
    """CE + weight mean_k relu(max z - z_k - margin), margin-based label smoothing (Liu et al. 2022).

    The mean is over all K classes, the largest logit among them. The constraint asks no target, so a soft one enters CE alone.
    """
    z = widen(logits)
    return cross_entropy(z, target) + weight * (z.amax(dim=1, keepdim=True) - z - margin).relu().mean()


def acls(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: NonNegative = 0.1,
    positive: NonNegative = 1.0,
    negative: NonNegative = 0.1,
    margin: NonNegative = 10.0,
) -> torch.Tensor:
    """CE + weight (positive relu(z_m - margin)^2 + negative mean_{k != m} relu(sg(z_m) - z_k - margin)^2), m the predicted class.

    Adaptive and conditional label smoothing (Park et al. 2023), with the parameters of its published code. sg: no gradient.
    The first term bounds the largest logit itself. The constraint asks no target, so a soft one enters CE alone.
    """
    z = widen(logits)
    top = z.amax(dim=1, keepdim=True)
    above = (top - margin).relu().square().mean()
    # The predicted class adds relu(-margin) = 0.
    apart = (top.detach() - z - margin).relu().square().sum(dim=1).mean() / (z.shape[1] - 1)
    return cross_entropy(z, target) + weight * (positive * above + negative * apart)


def cpc(
    logits: torch.Tensor, target: torch.Tensor, discrimination: NonNegative = 1.0, exclusion: NonNegative = 1.0
) -> torch.Tensor:
    """CE + discrimination * D + exclusion * E, calibration by pairwise constraints (Cheng & Vasconcelos 2022).

    With s_ij = -log sigmoid(z_i - z_j), the cost of class i against class j alone,

        D = 1/(K-1) sum_{j != y} s_yj                             the label's class wins against every other
        E = 1/(2(K-1)(K-2)) sum_{i != j, both != y} s_ij          two classes that are not the label's are even; 0 for K = 2

    E has the scale of the implementations that circulate (the authors published none), without their constant terms i = j: half the mean
    cross-entropy to 1/2 over pairs. Both are linear in the target: E weighs s_ij by 1 - t_i - t_j. Memory N K^2.
    """
    z, target = widen(logits), widen(target)
    classes = z.shape[1]
    cost = -F.logsigmoid(z[:, :, None] - z[:, None, :])  # (N, K, K)
    weight = discrimination / (classes - 1) * target[:, :, None].expand_as(cost)
    if classes > 2:
        left = 1 - target[:, :, None] - target[:, None, :]
        weight = weight + exclusion / (2 * (classes - 1) * (classes - 2)) * left
    others = 1 - torch.eye(classes, dtype=z.dtype, device=z.device)
    return cross_entropy(z, target) + (weight * others * cost).sum(dim=(1, 2)).mean()
