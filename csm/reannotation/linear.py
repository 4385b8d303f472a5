"""Multinomial logistic regression on the features."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.reannotation.heads import FitInputs, check_size
from csm.reannotation.moments import class_means
from csm.reannotation.selection import held_out_nll

logger = logging.getLogger(__name__)

CHOOSE = 0.0
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C, from stiff to free; of equal ones the first is taken


class Linear(nn.Module):
    """log p(k | x) = log softmax of weight_k . (x - center) / spread + bias_k, float32."""

    center: torch.Tensor
    spread: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    c: torch.Tensor

    def __init__(
        self, center: torch.Tensor, spread: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, c: torch.Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("c", c)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_size(features, self.weight.shape[1], "linear")
        return nn.functional.linear((features - self.center) / self.spread, self.weight, self.bias).log_softmax(dim=1)


def fit_linear(directory: Path, inputs: FitInputs, c: float = CHOOSE, iterations: int = 1000) -> None:
    """scikit-learn's logistic regression (L-BFGS, L2 penalty) on standardised features of the training images, all in memory.

    Args:
        c: C, the inverse strength of the penalty, above 0; 0 takes that of ``STRENGTHS`` whose held-out NLL, at its best temperature,
            is least, among those that converge.
        iterations: of L-BFGS, at most.

    Raises:
        InputError: a class has no training image, a feature is not finite, no image is held out to choose C by, or no fit converges.
    """
    from sklearn.linear_model import LogisticRegression  # importing it takes a second; workers only load what was fitted

    if not 0 <= c < float("inf"):
        raise InputError(f"linear.c: expected a number above 0, or 0 to choose it, got {c}")
    if iterations < 1:
        raise InputError(f"linear.iterations: expected a whole number of at least 1, got {iterations}")
    class_means(inputs.features.batches("train"), inputs.n_classes, "linear")  # that there is what a fit needs
    features, labels = inputs.features.matrix("train")
    center, spread = features.double().mean(dim=0), features.double().std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)  # a constant dimension says nothing
    standard = ((features - center) / spread).numpy()
    # One object: each C starts from the weights of the one before.
    solver = LogisticRegression(max_iter=iterations, warm_start=True)
    fitted: dict[float, Linear] = {}
    for strength in [c] if c else STRENGTHS:
        weights = _solve(solver, standard, labels.numpy(), strength)
        if weights is None:
            logger.warning("linear: C = %g did not converge in %d iterations and is left out", strength, iterations)
        else:
            fitted[strength] = Linear(center.float(), spread.float(), *weights, torch.tensor(strength))
    if not fitted:
        raise InputError(
            f"linear: the fit does not converge in {iterations} iterations: set its iterations higher, or a smaller c"
        )
    if not c:
        found = {strength: held_out_nll(head, inputs.features, "linear") for strength, head in fitted.items()}
        c = min(found, key=found.__getitem__)
        logger.info("linear: C = %g, by held-out NLL: %s", c, ", ".join(f"{k:g} {v:.4f}" for k, v in found.items()))
    storage.write_tensors(directory / "linear.safetensors", fitted[c].state_dict())


def load_linear(directory: Path) -> Linear:
    """Return what ``fit_linear`` kept."""
    return Linear(**storage.read_tensors(directory / "linear.safetensors"))


def _solve(solver: Any, features: Any, labels: Any, c: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weights float32 (K, F) and biases (K,), or None if ``solver`` did not converge."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            solver.set_params(C=c).fit(features, labels)
        except ConvergenceWarning:
            return None
    weight, bias = (torch.from_numpy(value).float() for value in (solver.coef_, solver.intercept_))
    if len(weight) == 1:  # of two classes it keeps the second
        weight, bias = (torch.cat([torch.zeros_like(value), value]) for value in (weight, bias))
    return weight, bias
