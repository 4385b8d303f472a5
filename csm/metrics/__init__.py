"""Metrics of a classifier's confidence: functions ``(probs, labels) -> 0-dim float64`` and their registry."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from csm.metrics.calibration import aece, ece
from csm.metrics.scores import accuracy, brier, check_logits, check_temperature, nll, nll_from_log_probs


class Metric(NamedTuple):
    """A registry entry: ``function(probs, labels)``, with ``n_bins`` as a third argument if ``binned``.

    ``from_log_probs(log_probs, labels)`` is the same metric, exact where probabilities underflow to 0.
    """

    function: Callable[..., Tensor]
    binned: bool = False
    from_log_probs: Callable[[Tensor, Tensor], Tensor] | None = None


def evaluate(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    n_bins: int = 15,
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Compute metrics of ``softmax(logits / temperature)``, in float64 throughout.

    Args:
        logits: (N, K), floating point, finite; N >= 1, K >= 2.
        labels: (N,), integer, in 0..K-1.
        temperature: finite, > 0; 1 leaves the logits as they are.
        n_bins: number of bins of the binned metrics, > 0.
        metrics: names from :data:`METRICS`, in the order wanted; None for all.

    Returns:
        Metric name -> value. Fractions, not percent; NLL in nats, finite for any finite float32 logits.

    Raises:
        ValueError: an argument is out of range, shapes do not match, or a metric is unknown.
    """
    names = list(METRICS) if metrics is None else list(metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"metrics must be names among {', '.join(METRICS)}, got {', '.join(unknown)}")
    check_logits(logits, labels)
    check_temperature(temperature)

    scaled = logits.detach().double() / temperature
    # Not log_probs.exp(): that pushes a probability off the bin edge it lies on (1/K of K equal logits).
    probs, log_probs = scaled.softmax(dim=1), scaled.log_softmax(dim=1)
    values: dict[str, float] = {}
    for name in names:
        metric = METRICS[name]
        if metric.from_log_probs is not None:
            value = metric.from_log_probs(log_probs, labels)
        elif metric.binned:
            value = metric.function(probs, labels, n_bins)
        else:
            value = metric.function(probs, labels)
        values[name] = value.item()
    return values


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy),
    "ece": Metric(ece, binned=True),
    "aece": Metric(aece, binned=True),
    "nll": Metric(nll, from_log_probs=nll_from_log_probs),
    "brier": Metric(brier),
}
