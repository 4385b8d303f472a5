"""Metrics of a classifier's confidence: functions ``(probs, labels[, n_bins]) -> 0-dim float64`` and their registry."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csm.metrics.calibration import aece, classwise_ece, ece, ks, l2_ce_debiased, mce, oe, ue
from csm.metrics.decomposition import brier_reliability, brier_resolution, brier_uncertainty
from csm.metrics.scores import accuracy, block_rows, brier, check_logits, check_temperature, nll, nll_from_log_probs
from csm.metrics.selective import aurc
from csm.metrics.smoothing import smooth_ece


class Metric(NamedTuple):
    """A registry entry: ``function(probs, labels)``, with ``n_bins`` as a third argument if ``binned``.

    ``from_log_probs(log_probs, labels)`` is the same metric, exact where probabilities underflow to 0; a mean over
    samples, so that blocks of them can be measured apart.
    """

    function: Callable[..., Tensor]
    binned: bool = False
    from_log_probs: Callable[[Tensor, Tensor], Tensor] | None = None
    higher_is_better: bool = False


def evaluate(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    n_bins: int = 15,
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Compute metrics of ``softmax(logits / temperature)``, in float64 throughout.

    Beside the logits this holds their probabilities, 8 bytes each; whatever else is as large goes by blocks.

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

    scores, rows = logits.detach(), block_rows(logits)
    probs = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    for part, block in zip(probs.split(rows), scores.split(rows), strict=True):
        # Not log_softmax().exp(): that pushes a probability off the bin edge it lies on (1/K of K equal logits).
        part.copy_((block.double() / temperature).softmax(dim=1))
    values: dict[str, float] = {}
    for name in names:
        metric = METRICS[name]
        if metric.from_log_probs is not None:
            values[name] = sum(
                metric.from_log_probs((block.double() / temperature).log_softmax(dim=1), y).item() * (len(y) / len(labels))
                for block, y in zip(scores.split(rows), labels.split(rows), strict=True)
            )
        elif metric.binned:
            values[name] = metric.function(probs, labels, n_bins).item()
        else:
            values[name] = metric.function(probs, labels).item()
    return values


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, higher_is_better=True),
    "ece": Metric(ece, binned=True),
    "aece": Metric(aece, binned=True),
    "classwise_ece": Metric(classwise_ece, binned=True),
    "mce": Metric(mce, binned=True),
    "ks": Metric(ks),
    "oe": Metric(oe, binned=True),
    "ue": Metric(ue, binned=True),
    "nll": Metric(nll, from_log_probs=nll_from_log_probs),
    "brier": Metric(brier),
    "brier_reliability": Metric(brier_reliability, binned=True),
    "brier_resolution": Metric(brier_resolution, binned=True, higher_is_better=True),
    "brier_uncertainty": Metric(brier_uncertainty),
    "l2_ce_debiased": Metric(l2_ce_debiased, binned=True),
    "smooth_ece": Metric(smooth_ece),
    "aurc": Metric(aurc),
}
