"""Temperature scaling: Guo et al., "On calibration of modern neural networks", ICML 2017, sec. 4.2."""

import logging
import math
from collections.abc import Mapping
from typing import Any

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


def fit_scaled_temperature(logits: Tensor, labels: Tensor) -> tuple[float, str]:
    """:func:`fit_temperature` on logits of any scale, and 1 where nothing tells T; with a note on what the data could not tell.

    The range [0.01, 100] is that of T over the mean standard deviation of a row, if that is above 1: a likelihood of many pixels can
    need a T of hundreds.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    check_logits(logits, labels)
    own = logits.gather(1, labels.long()[:, None]).squeeze(1)
    if bool((own >= logits.amax(dim=1)).all()):
        return 1.0, "every held-out image is right, which does not tell T: kept at 1"
    spread = max(1.0, logits.double().std(dim=1).mean().item())
    temperature = fit_temperature(logits.double() / spread, labels, quiet=True)  # the note says it
    note = f"T = {temperature * spread:g} is the end of its range" if temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE) else ""
    return temperature * spread, note


def temperature_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """What ``temperature`` of ``POSTHOC`` fits: ``{"temperature": T}``, and a note."""
    temperature, note = fit_scaled_temperature(logits, labels)
    return {"temperature": temperature}, note


def scale_by_temperature(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """What ``temperature`` of ``POSTHOC`` applies."""
    return apply_temperature(logits, values["temperature"])


def _nll(z: Tensor, z_label: Tensor, u: float) -> tuple[float, float]:
    """Summed NLL at T = exp(u) and its derivative in u; in closed form, so it works under inference_mode.

    The sum, not the mean: its curvature grows with N, and the fixed tolerances of L-BFGS do not end it early.
    """
    beta = math.exp(-u)
    log_norm = (beta * z).logsumexp(dim=1)
    mean = ((beta * z - log_norm[:, None]).exp() * z).sum(dim=1)  # (N,), expectation of z under the model
    return (log_norm - beta * z_label).sum().item(), beta * (z_label - mean).sum().item()
