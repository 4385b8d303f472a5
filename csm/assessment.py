"""Is a model calibrated? Its metrics with intervals over the images, and what chance alone would make of its ECE.

The ECE of finitely many images is too high: in every bin, chance moves the share of right predictions away from the mean confidence, and
the ECE counts that distance as an error. A model whose confidences are perfectly right has an ECE above 0 as well, here ``chance_ece``
(consistency resampling: Bröcker & Smith, Weather and Forecasting 2007; Vaicenavicius et al., AISTATS 2019, sec. 4). A resample of
the images only adds to that bias, so ``ece_interval`` asks instead which true ECEs could have shown what was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csm.metrics import METRICS, evaluate
from csm.metrics.binning import Bins, bin_samples
from csm.metrics.calibration import mean_gap, top_label
from csm.statistics import bootstrap, interval

DRAWS = 1000
RESAMPLES = 200  # of metrics that have to be measured again on each resample, at most
WORK = 200_000_000  # probabilities that those resamples hold together, at most
FEWEST = 50  # resamples below which there is no interval
STEPS = 24  # of a bisection: far below the noise of the draws
PER_IMAGE = ("accuracy", "nll", "brier")

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric of a sample, and its 95 % interval; no interval (None) where resampling would take too long."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Assessment:
    """What ``assess`` measured.

    ``chance`` is the ECE that as many images would show if the model were perfectly calibrated: the mean, and the 2.5 and 97.5 % points.
    """

    images: int
    metrics: dict[str, Estimate]
    chance: Estimate


def assess(
    log_probs: Tensor, labels: Tensor, n_bins: int = 15, draws: int = DRAWS, seed: int = 0, resamples: int = RESAMPLES
) -> Assessment:
    """Every metric of ``csm.metrics`` with its 95 % interval over the images: that of the model, which stays as it is.

    The ECE's interval is that of ``ece_interval``; accuracy, NLL and Brier score have the percentile bootstrap of ``csm.statistics``; the
    others one of ``resamples`` resamples, shifted so that its mean is the value (there, too, since resampling biases them).

    Args:
        log_probs: (N, K), floating point, finite, rows normalised.
        labels: (N,), integer, in 0..K-1.
        n_bins: of the binned metrics.
        draws: resamples, and simulations of the ECE.
        seed: of all that is drawn.
        resamples: of the metrics that must be measured anew; fewer where ``WORK`` says so.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    values = evaluate(log_probs, labels, n_bins=n_bins)
    probs = log_probs.double().softmax(dim=1)
    confidence, correct = top_label(probs, labels)
    metrics = {name: Estimate(value) for name, value in values.items()}
    drawn = bootstrap({"": [(log_probs, labels)]}, PER_IMAGE, n_bins, draws, seed)[""]
    for name, of_metric in drawn.items():
        metrics[name] = Estimate(values[name], *interval(of_metric))
    metrics["ece"] = Estimate(values["ece"], *ece_interval(confidence, correct, n_bins, draws, seed))
    others = [name for name in METRICS if name not in (*PER_IMAGE, "ece")]
    for name, ends in _resampled(probs, labels, others, values, n_bins, min(resamples, draws), seed).items():
        metrics[name] = Estimate(values[name], *ends)
    by_chance = chance_ece(confidence, n_bins, draws, seed)
    return Assessment(len(labels), metrics, Estimate(by_chance.mean().item(), *interval(by_chance)))


def chance_ece(confidence: Tensor, n_bins: int = 15, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """ECEs float64 (draws,) that chance gives to a perfectly calibrated model with these confidences (N,)."""
    bins = bin_samples(confidence, confidence, n_bins)
    count, mean = _filled(bins)[:2]
    return torch.from_numpy(_simulated(count, mean, mean, draws, seed))


def ece_interval(
    confidence: Tensor, correct: Tensor, n_bins: int = 15, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the true ECE, in these bins, that allows for what chance adds to the measured one.

    The true gaps of the bins are taken to be s times those measured, 0 <= s <= 1; for each s the right predictions of each bin are
    drawn (binomial). The lower end is the ECE at the s below which one as high as measured has a chance below (1 - level) / 2, or 0 if
    a perfectly calibrated model has more: few images give a wide interval that begins at 0, not a high one. The upper end is that of
    draws at s = 1, shifted so that their mean is the measured ECE, as ``csm.statistics`` shifts resamples; as what is measured is too high
    already, the true ECE is rarely above it.

    Args:
        confidence, correct: (N,), of the predicted class; in [0, 1], and whether it is the label.
        n_bins: equal width.
        draws: simulations for each s.
        seed: of the simulations.
        level: inside (0, 1).

    Returns:
        (low, high), fractions, the measured ECE between them.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie inside (0, 1), got {level}")
    bins = bin_samples(confidence, correct, n_bins)
    measured = mean_gap(bins).item()
    count, mean, outcome = _filled(bins)
    share, gap, tail = count / count.sum(), outcome - mean, (1 - level) / 2

    def true_ece(scale: float) -> float:
        return float((share * np.abs(np.clip(mean + scale * gap, 0, 1) - mean)).sum())

    def simulated(scale: float) -> Numbers:
        return _simulated(count, mean, np.clip(mean + scale * gap, 0, 1), draws, seed)

    def is_too_small(scale: float) -> bool:
        return bool((simulated(scale) >= measured - 1e-12).mean() <= tail)

    as_measured = simulated(1.0)
    high = measured + float(np.quantile(as_measured, 1 - tail) - as_measured.mean())
    if not is_too_small(0.0):
        return 0.0, min(1.0, high)
    below, above = 0.0, 1.0
    for _ in range(STEPS):
        middle = (below + above) / 2
        below, above = (middle, above) if is_too_small(middle) else (below, middle)
    return min(true_ece(below), measured), min(1.0, high)


def _filled(bins: Bins) -> tuple[Numbers, Numbers, Numbers]:
    """Count, mean confidence and outcome of the bins that hold images."""
    full = bins.count > 0
    count, confidence, outcome = (field[full].cpu().numpy() for field in (bins.count, bins.confidence, bins.outcome))
    return count, confidence, outcome


def _simulated(count: Numbers, confidence: Numbers, accuracy: Numbers, draws: int, seed: int) -> Numbers:
    """ECEs (draws,) where the right predictions of each bin are drawn with the chance ``accuracy``.

    Confidences within a bin differ little, so binomial numbers stand for sums of unequal chances, whose variance is hardly smaller.
    """
    right = np.random.default_rng(seed).binomial(count.astype(np.int64), np.clip(accuracy, 0, 1), (draws, len(count)))
    ece: Numbers = np.abs(right - count * confidence).sum(axis=1) / count.sum()
    return ece


def _resampled(
    probs: Tensor, labels: Tensor, names: Sequence[str], values: dict[str, float], n_bins: int, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Shifted 95 % percentile intervals of metrics that are measured on each resample; none if only a few could be afforded."""
    resamples = min(resamples, WORK // probs.numel())
    if resamples < FEWEST:
        return {}
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        rows = torch.randint(len(labels), (len(labels),), generator=generator)
        some, own = probs[rows], labels[rows]
        measured = (
            METRICS[name].function(some, own, n_bins) if METRICS[name].binned else METRICS[name].function(some, own)
            for name in names
        )
        drawn.append([value.item() for value in measured])
    columns = torch.tensor(drawn, dtype=torch.float64).T
    ends = {}
    for name, column in zip(names, columns, strict=True):
        low, high = interval(column - column.mean() + values[name], least=0.0)
        ends[name] = (low, min(1.0, high))  # of these metrics, all lie in [0, 1]
    return ends
