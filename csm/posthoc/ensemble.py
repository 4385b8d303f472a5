"""Mixtures of predictions, and ensemble temperature scaling (Zhang, Kailkhura & Han, "Mix-n-Match", ICML 2020, sec. 3.2)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csm.posthoc.temperature import apply_temperature, fit_scaled_temperature

TOLERANCE, MAX_STEPS = 1e-6, 10_000


def pool_weights(log_likelihoods: Tensor) -> Tensor:
    """Weights w on the simplex of greatest ``mean_i log sum_m w_m L_im``, by EM from equal weights (Dempster et al. 1977).

    The likelihood is concave and never falls from step to step. At the end it is within 1e-6 nats of its maximum: that is at most
    ``max_m mean_i (L_im / sum_j w_j L_ij) - 1`` away (its tangent). Should 10,000 steps not suffice, within ``log(M) / 10000``.

    Args:
        log_likelihoods: log L float64 (N, M), of N labels by M members.

    Returns:
        float64 (M,).
    """
    weights = torch.full_like(log_likelihoods[0], 1 / log_likelihoods.shape[1])
    for _ in range(MAX_STEPS):
        gain = (log_likelihoods - (log_likelihoods + weights.log()).logsumexp(dim=1, keepdim=True)).exp().mean(dim=0)
        if gain.max() <= 1 + TOLERANCE:
            break
        weights = weights * gain
    return weights / weights.sum()


def ensemble_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """T as in temperature scaling, then the weights of its three members: at T, at 1, and uniform."""
    temperature, note = fit_scaled_temperature(logits, labels)
    members = _members(logits, temperature)
    own = labels[:, None, None].expand(-1, 3, 1)
    return {"temperature": temperature, "weights": pool_weights(members.gather(2, own).squeeze(2)).tolist()}, note


def mix_temperatures(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """log(w_1 softmax(z / T) + w_2 softmax(z) + w_3 / K)."""
    weights = logits.new_tensor(values["weights"]).clamp(min=torch.finfo(torch.float64).tiny)
    return (_members(logits, values["temperature"]) + weights.log()[:, None]).logsumexp(dim=1).log_softmax(dim=1)


def _members(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (N, 3, K) of the three members."""
    uniform = torch.full_like(logits, -math.log(logits.shape[1]))
    return torch.stack([apply_temperature(logits, temperature), logits.log_softmax(dim=1), uniform], dim=1)
