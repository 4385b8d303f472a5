"""Matrix scaling and Dirichlet calibration: an affine map of logits or log-probabilities, kept simple by ODIR.

Matrix scaling: Guo et al., "On calibration of modern neural networks", ICML 2017, sec. 4.2. Dirichlet calibration and ODIR (off-diagonal
and intercept regularisation): Kull et al., "Beyond temperature scaling", NeurIPS 2019, sec. 3 and 4.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csm.posthoc.temperature import fit_scaled_temperature
from csm.posthoc.vector import fit_vector

MOST_CLASSES = 200  # above which the map is diagonal: K^2 numbers are more than images tell, and each step costs N K^2
STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01)  # of ODIR
FOLDS = 5


def fit_affine(z: Tensor, labels: Tensor, strength: float, temperature: float = 1.0, start: Tensor | None = None) -> Tensor:
    """W and b, as float64 (K, K + 1), of least NLL of softmax(W z + b) with ODIR.

    Mean NLL + strength (mean_{i != j} (T W_ij)^2 + mean_i b_i^2) + sum_i (T W_ii - 1)^2 / (2 N). The last term, which many samples
    outweigh, gives a minimum also where a class can be separated. Convex; L-BFGS.

    Args:
        z: (N, K), finite.
        labels: (N,).
        strength: lambda = mu of ODIR, > 0.
        temperature: T, about which W is the identity divided by T.
        start: where to begin; None: at temperature scaling.
    """
    count, k = z.shape
    scaled = torch.cat([z / temperature, torch.ones_like(z[:, :1])], dim=1)  # (N, K + 1)
    diagonal = torch.eye(k, k + 1, dtype=torch.float64, device=z.device)
    penalty = torch.full_like(diagonal, strength / max(1, k * (k - 1)))
    penalty[:, -1] = strength / k
    penalty = torch.where(diagonal > 0, 0.5 / count, penalty)
    parameters = diagonal.clone() if start is None else start.clone()
    if start is not None:
        parameters[:, :-1] *= temperature
    rows = torch.arange(count, device=z.device)
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=300, history_size=10, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        log_probs = (scaled @ parameters.T).log_softmax(dim=1)
        off = log_probs.exp()
        off[rows, labels] -= 1
        parameters.grad = off.T @ scaled / count + 2 * penalty * (parameters - diagonal)
        return (-log_probs[rows, labels].mean() + (penalty * (parameters - diagonal).square()).sum()).item()

    optimiser.step(closure)
    parameters[:, :-1] /= temperature
    return parameters


def matrix_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """Of centred logits: a shift of a row means nothing."""
    return _values(_centred(logits), labels)


def apply_matrix(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """log softmax(W z + b), z the centred logits."""
    return _apply(_centred(logits), values)


def dirichlet_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """Of log-probabilities (Kull et al., the linear parametrisation, eq. 7)."""
    return _values(logits.log_softmax(dim=1), labels)


def apply_dirichlet(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """log softmax(W log p + b)."""
    return _apply(logits.log_softmax(dim=1), values)


def _values(z: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """The strength that predicts a fifth of the images best from the rest, then a fit to all; temperature scaling where nothing tells.

    Strengths are tried from the strongest on, until a weaker one predicts worse. Of more than ``MOST_CLASSES`` classes the matrix is
    diagonal, fitted as vector scaling is: "matrix" then has a weight and a bias for each class, (K, 2) in place of (K, K + 1).
    """
    temperature, note = fit_scaled_temperature(z, labels)
    k = z.shape[1]
    if k > MOST_CLASSES:
        weights, biases = (z.new_full((k,), 1 / temperature), z.new_zeros(k)) if note else fit_vector(z, labels, temperature)
        instead = f"{note}; temperature scaling instead" if note else f"{k} classes, more than {MOST_CLASSES}: a diagonal matrix"
        return {"matrix": torch.stack([weights, biases], dim=1).tolist(), "strength": None}, instead
    if note:
        scaling = torch.eye(k, k + 1, dtype=torch.float64, device=z.device) / temperature
        return {"matrix": scaling.tolist(), "strength": None}, f"{note}; temperature scaling instead"
    order = torch.argsort(labels, stable=True)
    held_out = torch.zeros(len(labels), dtype=torch.bool, device=z.device)
    held_out[order[::FOLDS]] = True  # in order of class, every fifth: as stratified as can be
    best, least = STRENGTHS[0], float("inf")
    affine: Tensor | None = None
    for strength in STRENGTHS:
        affine = fit_affine(z[~held_out], labels[~held_out], strength, temperature, affine)
        log_probs = _map(z[held_out], affine)
        nll = -log_probs.gather(1, labels[held_out][:, None]).mean().item()
        if nll >= least:
            break
        best, least = strength, nll
    return {"matrix": fit_affine(z, labels, best, temperature).tolist(), "strength": best}, ""


def _map(z: Tensor, affine: Tensor) -> Tensor:
    if affine.shape[1] == 2:  # K + 1 is 3 at least
        return (z * affine[:, 0] + affine[:, 1]).log_softmax(dim=1)
    return (z @ affine[:, :-1].T + affine[:, -1]).log_softmax(dim=1)


def _apply(z: Tensor, values: Mapping[str, Any]) -> Tensor:
    return _map(z, z.new_tensor(values["matrix"]))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=1, keepdim=True)
