"""Post-hoc calibration: what is fitted on held-out logits after training.

Temperature and vector scaling: Guo et al., "On calibration of modern neural networks", ICML 2017, sec. 4.2. Isotonic regression:
Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from csm.metrics.scores import check_logits, check_temperature

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities ``log_softmax(logits / temperature)`` (Guo et al., eq. 9); differentiable.

    Args:
        logits: (..., K), floating point.
        temperature: finite, > 0; above 1 softens, below 1 sharpens. The most probable class stays the same.

    Returns:
        Same shape, float64, <= 0.

    Raises:
        ValueError: temperature is out of range.
    """
    check_temperature(temperature)
    return torch.log_softmax(logits.double() / temperature, dim=-1)


def fit_temperature(logits: Tensor, labels: Tensor, quiet: bool = False) -> float:
    """The temperature T in [0.01, 100] of least NLL of ``softmax(logits / T)`` (Guo et al., sec. 4.2).

    The search runs over log T, so T is positive, by L-BFGS with a strong Wolfe line search, in float64. The
    NLL is convex in 1/T, so the sign of its slope at an end of the range tells whether the minimum lies
    outside. If so, that end is returned and a warning logged:

    * 0.01 when every label has the highest logit of its row (the NLL falls all the way to T = 0; such data
      cannot tell T, so a caller may prefer 1), or when the logits are tiny in scale;
    * 100 when the logits do not help to tell the labels (the NLL falls all the way to T = inf), or when they
      are huge in scale.

    If all logits of each row are equal, every T has the same NLL; 1.0 is returned and a warning logged.

    Args:
        logits: (N, K) of held-out samples, floating point, finite; N >= 1, K >= 2.
        labels: (N,), integer, in 0..K-1.
        quiet: log nothing above debug level, for a caller that only compares fits.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    check_logits(logits, labels)
    level = logging.DEBUG if quiet else logging.WARNING
    z = logits.detach().double()
    z = z - z.amax(dim=1, keepdim=True)  # <= 0, and 0 exactly where a logit is the highest of its row
    z_label = z.gather(1, labels.long()[:, None]).squeeze(1)  # (N,)

    if not bool(z.any()):
        logger.log(level, "temperature cannot be fitted: the logits of each row are all equal; using 1.0")
        return 1.0
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    # Tested on the logits, not by the slope: the slope of a saturated softmax underflows to 0 at both ends.
    if not bool(z_label.any()):
        logger.log(
            level,
            "temperature clamped to %g: all %d predictions are correct, which says nothing on T",
            MIN_TEMPERATURE,
            len(z),
        )
        return MIN_TEMPERATURE
    if _nll(z, z_label, low)[1] >= 0:
        logger.log(level, "temperature clamped to %g: the NLL is lowest at or below it", MIN_TEMPERATURE)
        return MIN_TEMPERATURE
    if _nll(z, z_label, high)[1] <= 0:
        logger.log(level, "temperature clamped to %g: the NLL is lowest at or above it", MAX_TEMPERATURE)
        return MAX_TEMPERATURE

    u = torch.zeros(1, dtype=torch.float64)  # log T
    optimiser = torch.optim.LBFGS([u], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> float:
        value, slope = _nll(z, z_label, u.item())
        u.grad = torch.tensor([slope], dtype=torch.float64)
        return value

    optimiser.step(closure)
    return math.exp(min(max(u.item(), low), high))


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


def fit_isotonic(scores: Tensor, outcomes: Tensor) -> tuple[tuple[float, float], ...]:
    """The increasing function of least squares, by pool-adjacent-violators, as knots (score, mean outcome) (Zadrozny & Elkan, 2002).

    Outcomes are kept away from 0 and 1 by 1 / (N + 2), the estimate of an event never seen in N trials (Laplace's rule).

    Args:
        scores: (N,), finite.
        outcomes: (N,), 0 or 1.

    Returns:
        Scores strictly increasing, outcomes not decreasing; for :func:`apply_isotonic`.
    """
    from sklearn.isotonic import IsotonicRegression  # a second to import, which every reader of labels would pay

    floor = 1 / (len(scores) + 2)
    fitted = IsotonicRegression(out_of_bounds="clip").fit(scores.double().cpu().numpy(), outcomes.double().cpu().numpy())
    means = fitted.y_thresholds_.clip(floor, 1 - floor)
    return tuple(zip(fitted.X_thresholds_.tolist(), means.tolist(), strict=True))


def apply_isotonic(scores: Tensor, knots: Sequence[tuple[float, float]]) -> Tensor:
    """Interpolate linearly between ``knots``, constant beyond the first and last; same shape as ``scores``, float64."""
    x, y = torch.tensor(knots, dtype=torch.float64, device=scores.device).T.contiguous()
    if len(x) == 1:
        return torch.where(scores.isnan(), torch.nan, y)
    right = torch.searchsorted(x, scores.double().contiguous()).clamp(1, len(x) - 1)
    share = ((scores - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return torch.lerp(y[right - 1], y[right], share)


def _nll(z: Tensor, z_label: Tensor, u: float) -> tuple[float, float]:
    """Summed NLL at T = exp(u) and its derivative in u; in closed form, so it works under inference_mode.

    The sum, not the mean: its curvature grows with N, and the fixed tolerances of L-BFGS do not end it early.
    """
    beta = math.exp(-u)
    log_norm = (beta * z).logsumexp(dim=1)
    mean = ((beta * z - log_norm[:, None]).exp() * z).sum(dim=1)  # (N,), expectation of z under the model
    return (log_norm - beta * z_label).sum().item(), beta * (z_label - mean).sum().item()
