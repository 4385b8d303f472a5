"""Vector scaling: a weight and a bias for each class (Guo et al., "On calibration of modern neural networks", ICML 2017, sec. 4.2)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csm.metrics.scores import check_logits, check_temperature
from csm.posthoc.temperature import fit_scaled_temperature


def fit_vector(log_probs: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights and biases of vector scaling ``softmax(w * log_probs + b)`` (Guo et al., sec. 4.2), each float64 (K).

    The NLL, summed over the samples, plus ``sum_k ((w_k T - 1)^2 + b_k^2) / 2``: a Gaussian prior about temperature scaling, which
    many samples outweigh. Without it the minimum does not exist where weights and biases can separate a class. L-BFGS, convex.

    Args:
        log_probs: (N, K) of held-out samples, rows normalised (a shift of a row is not without effect), finite; N >= 1, K >= 2.
        labels: (N,), integer, in 0..K-1.
        temperature: T, about which w is 1 / T.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    check_logits(log_probs, labels)
    check_temperature(temperature)
    z = log_probs.detach().double() / temperature
    rows, label = torch.arange(len(z), device=z.device), labels.long()
    parameters = torch.stack([torch.ones_like(z[0]), torch.zeros_like(z[0])])  # (2, K): w T, and b
    prior = parameters.clone()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        log_scaled = (parameters[0] * z + parameters[1]).log_softmax(dim=1)
        off = log_scaled.exp()
        off[rows, label] -= 1
        parameters.grad = torch.stack([(off * z).sum(dim=0), off.sum(dim=0)]) + parameters - prior
        return (0.5 * (parameters - prior).square().sum() - log_scaled[rows, label].sum()).item()

    optimiser.step(closure)
    return parameters[0] / temperature, parameters[1]


def vector_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """What ``vector`` of ``POSTHOC`` fits, about temperature scaling; that alone where nothing tells T."""
    temperature, note = fit_scaled_temperature(logits, labels)
    if note:
        k = logits.shape[1]
        return {"weights": [1 / temperature] * k, "biases": [0.0] * k}, f"{note}; temperature scaling instead"
    weights, biases = fit_vector(logits.log_softmax(dim=1), labels, temperature)
    return {"weights": weights.tolist(), "biases": biases.tolist()}, ""


def apply_vector(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of softmax(w log p + b)."""
    weights, biases = (logits.new_tensor(values[name]) for name in ("weights", "biases"))
    return (weights * logits.log_softmax(dim=1) + biases).log_softmax(dim=1)
