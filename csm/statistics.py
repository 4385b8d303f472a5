"""How sure a comparison of methods is: a paired bootstrap over seeds and test images, its intervals and p-values, and Holm's correction.

Each method was trained with S seeds, and every run has predicted the same N images, so seeds and images are crossed. A draw resamples
both, independently and with replacement (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007;
Davison & Hinkley, "Bootstrap methods and their application", 1997, sec. 3.8). All seeds of a draw see the same images, and all methods
the same images and seed numbers, so that what is easy or hard for all of them cancels in a difference (Efron & Tibshirani, "An
introduction to the bootstrap", 1993, ch. 8 and 16).

A draw takes N images, but S - 1 of the S seeds: with S of them the variance of a mean over seeds would come out (S - 1) / S too small,
which matters where S is 2 or 5 (Rao & Wu, JASA 1988). Still, few seeds tell their spread badly, and one seed tells none: an interval
over one seed is about the images alone, and is no ground to prefer a method.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from csm.metrics.binning import bin_indices, check_n_bins
from csm.metrics.calibration import top_label
from csm.metrics.scores import nll_from_log_probs

PER_IMAGE = ("accuracy", "nll", "brier")
BOOTSTRAPPED = ("accuracy", "ece", "nll", "brier")
CHUNK = 4_000_000  # resampling weights held at a time: 32 MB, and as much for the row numbers that they are counted from

Runs = Mapping[str, Sequence[tuple[Tensor, Tensor]]]


def image_scores(log_probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Accuracy (0 or 1), NLL in nats and Brier score of each image: float64 (N,), whose means are those of ``csm.metrics``.

    Args:
        log_probs: (N, K), floating point, rows normalised.
        labels: (N,), integer, in 0..K-1.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    nll_from_log_probs(log_probs, labels)  # for its checks
    log_p, own = log_probs.double(), labels.long()[:, None]
    probs = log_p.exp()
    target = torch.zeros_like(probs).scatter_(1, own, 1.0)
    return {
        "accuracy": top_label(probs, labels)[1].double(),
        "nll": log_p.gather(1, own).squeeze(1).clamp(max=0).abs(),
        "brier": (probs - target).square().sum(dim=1),
    }


def bootstrap(
    runs: Runs, metrics: Sequence[str] = BOOTSTRAPPED, n_bins: int = 15, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Resampled metrics of each method: means over the resampled seeds, of the resampled images (see the module's docstring).

    The draws of a metric are shifted so that their mean is the metric of the sample, the mean over its seeds. For means of images the
    shift is the noise of finitely many draws; the ECE of a resample is biased upwards, as its bins hold the noise of sample and resample
    (Efron & Tibshirani, ch. 10), so that without it an interval could lie above the value that it is about. A shifted ECE can be a
    little below 0 (``interval`` has ``least`` for that).

    Args:
        runs: method -> for each seed ``(log_probs (N, K), labels (N,))``, the seeds and images of every method in one order. Each method
            is looked up once, so the mapping may read them when asked.
        metrics: names among ``BOOTSTRAPPED``.
        n_bins: of the ECE, equal width.
        draws: resamples.
        seed: of the resampling. The same seed, N and S give the same images and seeds, so results of two calls are paired.

    Returns:
        method -> metric -> float64 (draws,).

    Raises:
        ValueError: a metric is unknown, there is no run, or a method has other seeds or images than the first.
    """
    unknown = [name for name in metrics if name not in BOOTSTRAPPED]
    if unknown or not metrics:
        raise ValueError(f"metrics must be names among {', '.join(BOOTSTRAPPED)}, got {', '.join(unknown) or 'none'}")
    check_n_bins(n_bins)
    if draws < 1:
        raise ValueError(f"draws must be an int > 0, got {draws}")
    methods = _reduce(runs, metrics, n_bins)
    first = next(iter(methods.values()))
    seeds, images = first.bins.shape
    collected: dict[str, list[Tensor]] = {name: [] for name in methods}
    for image_weights, seed_weights in _weights(images, seeds, draws, seed):
        for name, reduced in methods.items():
            collected[name].append(_resample(reduced, metrics, n_bins, image_weights, seed_weights))
    result = {}
    for name, reduced in methods.items():
        drawn = torch.cat(collected[name])  # (draws, metrics)
        ones = drawn.new_ones
        estimate = _resample(reduced, metrics, n_bins, ones(1, images), ones(1, seeds))
        drawn = drawn - drawn.mean(dim=0) + estimate
        result[name] = dict(zip(metrics, drawn.T, strict=True))
    return result


def interval(values: Tensor, level: float = 0.95, least: float = -math.inf) -> tuple[float, float]:
    """The percentile interval of bootstrap draws ``values`` (draws,) (Efron & Tibshirani, ch. 13), whose ends are not below ``least``.

    Raises:
        ValueError: level is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie inside (0, 1), got {level}")
    low, high = values.double().quantile(values.new_tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return max(least, low), max(least, high)


def paired_p(values_a: Tensor, values_b: Tensor) -> float:
    """Two-sided p-value of "a and b are equal" from paired bootstrap draws, each (draws,).

    ``2 min((1 + #{a <= b}), (1 + #{a >= b})) / (1 + draws)``, at most 1: the level at which the percentile interval of the difference
    just holds 0 (Efron & Tibshirani, sec. 15.4), with one draw added to each side, so it is never 0 (Davison & Hinkley, eq. 4.11).

    Raises:
        ValueError: the draws are not as many.
    """
    if values_a.shape != values_b.shape or values_a.ndim != 1:
        raise ValueError(f"paired draws must have one shape (draws,), got {tuple(values_a.shape)} and {tuple(values_b.shape)}")
    below, above = int((values_a <= values_b).sum()), int((values_a >= values_b).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(values_a)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given, for as many hypotheses tested at once (Holm, Scandinavian Journal of Statistics 1979).

    The i-th smallest of m times (m - i + 1), at least the one before, at most 1: rejecting those below a level keeps the chance of any
    wrong rejection below it, whatever the dependence.

    Raises:
        ValueError: a p-value is outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(
    runs: Runs,
    baseline: str,
    metrics: Sequence[str] = BOOTSTRAPPED,
    n_bins: int = 15,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """Differences of every other method to ``baseline``, with interval and p-value; see :func:`bootstrap` for arguments.

    Returns:
        Columns method, metric, difference (method minus baseline, of the means over seeds), low, high, p, and p_holm: corrected for the
        number of methods, each metric by itself.

    Raises:
        ValueError: see :func:`bootstrap`, or ``baseline`` is not among the methods.
    """
    return compare_draws(bootstrap(runs, metrics, n_bins, draws, seed), baseline, level)


def compare_draws(drawn: Mapping[str, Mapping[str, Tensor]], baseline: str, level: float = 0.95) -> pl.DataFrame:
    """:func:`compare` of what :func:`bootstrap` returned."""
    if baseline not in drawn:
        raise ValueError(f"baseline must be one of {', '.join(drawn)}, got {baseline}")
    rows = []
    for metric, reference in drawn[baseline].items():
        others = {name: values[metric] for name, values in drawn.items() if name != baseline}
        p_values = [paired_p(values, reference) for values in others.values()]
        for (name, values), p, p_holm in zip(others.items(), p_values, holm(p_values), strict=True):
            difference = values - reference
            rows.append((name, metric, difference.mean().item(), *interval(difference, level), p, p_holm))
    return pl.DataFrame(rows, schema=COMPARISON, orient="row")


COMPARISON = {
    "method": pl.String(),
    "metric": pl.String(),
    "difference": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "p": pl.Float64(),
    "p_holm": pl.Float64(),
}


class _Reduced(NamedTuple):
    """What a resample needs of a method."""

    scores: dict[str, Tensor]  # metric -> float64 (S, N)
    bins: Tensor  # uint8 to int32 (S, N): the bin of each confidence
    gaps: Tensor  # float64 (S, N): correct minus confidence


def _reduce(runs: Runs, metrics: Sequence[str], n_bins: int) -> dict[str, _Reduced]:
    methods: dict[str, _Reduced] = {}
    first: tuple[str, int, Tensor] | None = None
    for name in runs:
        predictions = runs[name]
        if not predictions:
            raise ValueError(f"{name} has no run")
        if first is None:
            first = (name, len(predictions), predictions[0][1].long())
        if len(predictions) != first[1]:
            raise ValueError(f"{name} has {len(predictions)} seeds, {first[0]} has {first[1]}: compare methods of the same seeds")
        scores: dict[str, list[Tensor]] = {metric: [] for metric in metrics if metric in PER_IMAGE}
        bins, gaps = [], []
        for number, (log_probs, labels) in enumerate(predictions):
            if not torch.equal(labels.long(), first[2]):
                raise ValueError(f"{name}, seed number {number}: other test images or labels than {first[0]} has")
            if not bool(log_probs.isfinite().all()):
                raise ValueError(f"{name}, seed number {number}: log-probabilities must be finite")
            of_image = image_scores(log_probs, labels)
            for metric, values in scores.items():
                values.append(of_image[metric])
            confidence, correct = top_label(log_probs.double().exp(), labels)
            bins.append(bin_indices(confidence, n_bins).to(torch.int32))
            gaps.append(correct.double() - confidence)
        methods[name] = _Reduced(
            {metric: torch.stack(values) for metric, values in scores.items()}, torch.stack(bins), torch.stack(gaps)
        )
    if not methods:
        raise ValueError("runs must hold at least one method")
    return methods


def _weights(images: int, seeds: int, draws: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """How often each image (chunk, N) and each seed (chunk, S) is in a draw, float64; chunks of draws, together ``draws``."""
    image_generator, seed_generator = torch.Generator().manual_seed(2 * seed), torch.Generator().manual_seed(2 * seed + 1)
    chunk = max(1, CHUNK // images)
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        yield _counts(rows, images, images, image_generator), _counts(rows, seeds, max(1, seeds - 1), seed_generator)


def _counts(rows: int, size: int, taken: int, generator: torch.Generator) -> Tensor:
    """How often each of ``size`` is among ``taken`` that are drawn, (rows, size)."""
    drawn = torch.randint(size, (rows, taken), generator=generator)
    return torch.zeros(rows, size, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(rows, size)
    )


def _resample(reduced: _Reduced, metrics: Sequence[str], n_bins: int, image_weights: Tensor, seed_weights: Tensor) -> Tensor:
    """Metrics (chunk, metrics) of resamples with image weights (chunk, N) and seed weights (chunk, S)."""
    seeds, images = reduced.bins.shape
    columns = []
    for metric in metrics:
        if metric == "ece":
            by_bin = torch.zeros(seeds, n_bins, images, dtype=torch.float64)
            by_bin.scatter_(1, reduced.bins.long()[:, None], reduced.gaps[:, None])
            of_seed = (image_weights @ by_bin.flatten(0, 1).T).unflatten(1, (seeds, n_bins)).abs().sum(dim=2)
        else:
            of_seed = image_weights @ reduced.scores[metric].T  # (chunk, S)
        columns.append((of_seed * seed_weights).sum(dim=1) / (images * seed_weights.sum(dim=1)))
    return torch.stack(columns, dim=1)
