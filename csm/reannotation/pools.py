"""Opinion pools: how several calibrated posteriors become one.

* ``linear``: ``p = sum_m w_m p_m``, weights on the simplex (Stone, "The opinion pool", Annals of Mathematical Statistics 32, 1961).
* ``log``: ``p`` proportional to ``prod_m p_m^w_m``, any weights from 0 up (Genest & Zidek, "Combining probability distributions: a critique
  and an annotated bibliography", Statistical Science 1, 1986; with all weights 1 a product of experts: Hinton, "Training products of
  experts by minimizing contrastive divergence", Neural Computation 14, 2002). Where the linear pool asks which member is right, this one
  adds up what they know: members that see different things sum to weights above 1, members that repeat each other to about 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from csm.posthoc.ensemble import pool_weights

TOLERANCE, MAX_STEPS, NEAR_ZERO = 1e-10, 100, 1e-3
LEAST = math.log(torch.finfo(torch.float64).tiny)  # a log-probability of minus infinity times a weight of 0 would be no number


class Pool(NamedTuple):
    """A registry entry; ``said`` are calibrated log-posteriors float64 (M, N, K), ``weights`` float64 (M,).

    Attributes:
        fit: (said, labels int64 (N,)) -> the weights of greatest likelihood.
        combine: (weights, said) -> pooled log-posterior float64 (N, K), rows normalised.
    """

    fit: Callable[[Tensor, Tensor], Tensor]
    combine: Callable[[Tensor, Tensor], Tensor]


def log_pool_weights(said: Tensor, labels: Tensor) -> Tensor:
    """Weights w >= 0 of least ``sum_i -log p_i(y_i) + ||w - 1/M||^2 / 2`` of the logarithmic pool p.

    The likelihood is that of logistic regression with M coefficients, so the sum is convex; its second term, a normal prior of variance 1
    about the geometric mean, is small beside hundreds of images and keeps the weights finite if all of them are read right. Projected
    Newton steps (Bertsekas, "Projected Newton methods for optimization problems with simple constraints", SIAM J. Control and
    Optimization 20, 1982) from 1/M, always the same ones; they end where no weight that is free to move has a
    slope above 1e-10 for each image.

    Args:
        said: log-posteriors (M, N, K).
        labels: int64 (N,).

    Returns:
        float64 (M,).
    """
    said = said.double().clamp(min=LEAST)
    start = torch.full((len(said),), 1 / len(said), dtype=torch.float64, device=said.device)
    own = _of_labels(said, labels).sum(dim=0)  # (M,)

    def loss(weights: Tensor) -> Tensor:
        log_norm = torch.einsum("m,mnk->nk", weights, said).logsumexp(dim=1).sum()
        return log_norm - weights @ own + (weights - start).square().sum() / 2

    weights = start
    for _ in range(MAX_STEPS):
        probs = torch.einsum("m,mnk->nk", weights, said).softmax(dim=1)
        mean = torch.einsum("nk,mnk->mn", probs, said)
        slope = mean.sum(dim=1) - own + (weights - start)
        if torch.where(weights > 0, slope, slope.clamp(max=0)).abs().max() <= TOLERANCE * len(labels):
            break
        centred = said - mean[:, :, None]
        curvature = torch.einsum("nk,ank,bnk->ab", probs, centred, centred) + torch.eye(len(weights)).to(mean)
        free = (weights > NEAR_ZERO) | (slope < 0)
        step = slope / curvature.diagonal()
        step[free] = torch.linalg.solve(curvature[free][:, free], slope[free])
        before, size = loss(weights), 1.0
        while loss(tried := (weights - size * step).clamp(min=0)) > before - 1e-4 * slope @ (weights - tried) and size > 1e-12:
            size /= 2
        if loss(tried) >= before:  # no shorter step is better: this is the best that float64 tells
            break
        weights = tried
    return weights


def _fit_linear(said: Tensor, labels: Tensor) -> Tensor:
    return pool_weights(_of_labels(said, labels))


def _combine_linear(weights: Tensor, said: Tensor) -> Tensor:
    return (weights.log()[:, None, None] + said).logsumexp(dim=0)


def _combine_log(weights: Tensor, said: Tensor) -> Tensor:
    return torch.einsum("m,mnk->nk", weights, said.clamp(min=LEAST)).log_softmax(dim=1)


def _of_labels(said: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label by each member, (N, M)."""
    return said[:, torch.arange(len(labels), device=labels.device), labels].T


POOLS: dict[str, Pool] = {"linear": Pool(_fit_linear, _combine_linear), "log": Pool(log_pool_weights, _combine_log)}
