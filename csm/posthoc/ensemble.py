"""Ensemble temperature scaling (Zhang, Kailkhura & Han, "Mix-n-Match", ICML 2020, sec. 3.2)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csm.posthoc.temperature import apply_temperature, fit_scaled_temperature


def fit_mixture(log_likelihoods: Tensor) -> Tensor:
    """Weights on the simplex, float64 (M,), of the mixture sum_m w_m exp(l_nm) of greatest mean log-likelihood.

    Expectation-maximisation, which never makes it worse and, as the problem is concave, ends at its maximum.

    Args:
        log_likelihoods: l (N, M), log-probability that member m gives to the label of image n.
    """
    likelihoods = (log_likelihoods - log_likelihoods.amax(dim=1, keepdim=True)).double().exp()
    weights = torch.full_like(likelihoods[0], 1 / likelihoods.shape[1])
    for _ in range(1000):
        mixed = likelihoods * weights
        updated = (mixed / mixed.sum(dim=1, keepdim=True)).mean(dim=0)
        done = bool((updated - weights).abs().max() < 1e-9)
        weights = updated
        if done:
            break
    return weights


def ensemble_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """T as in temperature scaling, then the weights of its three members: at T, at 1, and uniform."""
    temperature, note = fit_scaled_temperature(logits, labels)
    members = _members(logits, temperature)
    own = labels[:, None, None].expand(-1, 3, 1)
    return {"temperature": temperature, "weights": fit_mixture(members.gather(2, own).squeeze(2)).tolist()}, note


def mix_temperatures(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """log(w_1 softmax(z / T) + w_2 softmax(z) + w_3 / K)."""
    weights = logits.new_tensor(values["weights"]).clamp(min=torch.finfo(torch.float64).tiny)
    return (_members(logits, values["temperature"]) + weights.log()[:, None]).logsumexp(dim=1).log_softmax(dim=1)


def _members(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (N, 3, K) of the three members."""
    uniform = torch.full_like(logits, -math.log(logits.shape[1]))
    return torch.stack([apply_temperature(logits, temperature), logits.log_softmax(dim=1), uniform], dim=1)
