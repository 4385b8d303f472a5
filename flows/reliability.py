"""Reliability diagrams as data: bars of the bins, and a smooth curve with its band."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from csm.metrics.binning import Bins, bin_samples
from csm.metrics.calibration import mean_gap
from csm.metrics.smoothing import smooth_reliability, smooth_reliability_band

POINTS = 81  # of a smooth curve over [0, 1]


@dataclass(frozen=True)
class Predictions:
    """A method's top class: confidence (N,) or, of several seeds, (S, N) in [0, 1], and bool of the same shape whether it is correct."""

    confidence: NDArray[np.floating[Any]]
    correct: NDArray[np.bool_]


@dataclass(frozen=True)
class Reliability:
    """A method's test predictions before and (if fitted) after temperature scaling."""

    before: Predictions
    after: Predictions | None = None


class Bar(NamedTuple):
    """A bin of a reliability diagram that is not empty; all in fractions of the axis."""

    low: float
    high: float
    confidence: float
    accuracy: float
    share: float  # of all predictions
    height: float  # of the histogram


def is_drawable(pair: Reliability) -> bool:
    sides = (pair.before, pair.after) if pair.after is not None else (pair.before,)
    return all(side.confidence.size > 0 and bool(np.isfinite(side.confidence).all()) for side in sides)


def diagram(pair: Reliability, n_bins: int) -> dict[str, Any]:
    """What the page draws of a method's predictions, pooled over seeds: bars, ECE and smooth curves, before and after temperature."""
    sides = {"before": pair.before} | ({"after": pair.after} if pair.after is not None else {})
    bins = {side: _bins(predictions, n_bins) for side, predictions in sides.items()}
    gaps = {side: mean_gap(b).item() for side, b in bins.items()}
    highest = max(float(b.count.max() / b.count.sum()) for b in bins.values())
    return {
        "bars": {"after": [], **{side: _bars(b, highest) for side, b in bins.items()}},
        "curves": {"after": [], **{side: _curves(predictions) for side, predictions in sides.items()}},
        "ece": {"after": "", **{side: f"{100 * g:.{1 if g >= 0.01 else 2}f}" for side, g in gaps.items()}},
        "count": int(bins["before"].count.sum()),
        "highest": f"{100 * highest:.0f}",
    }


class Point(NamedTuple):
    """Of a smooth reliability curve: accuracy at a confidence, and its band."""

    confidence: float
    accuracy: float
    low: float
    high: float


def _curves(predictions: Predictions) -> list[list[Point]]:
    """The smooth curve, in pieces: it ends where no prediction is near, and, as a wide kernel sees far, with the predictions."""
    confidence = torch.from_numpy(np.asarray(predictions.confidence, dtype=np.float64))
    correct = torch.from_numpy(np.asarray(predictions.correct, dtype=np.float64))
    grid = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    accuracy = smooth_reliability(confidence, correct, grid).accuracy
    low, high = smooth_reliability_band(confidence, correct, grid)
    first, last = confidence.min().item(), confidence.max().item()
    pieces: list[list[Point]] = [[]]
    for point in zip(grid.tolist(), accuracy.tolist(), low.tolist(), high.tolist(), strict=True):
        if math.isnan(point[1]) or not first <= point[0] <= last:
            pieces.append([])
        else:
            pieces[-1].append(Point(*point))
    return [piece for piece in pieces if len(piece) > 1]


def _bins(predictions: Predictions, n_bins: int) -> Bins:
    confidence, correct = (
        torch.from_numpy(np.asarray(side, dtype=np.float64).ravel()) for side in (predictions.confidence, predictions.correct)
    )
    return bin_samples(confidence, correct, n_bins)


def _bars(bins: Bins, highest: float) -> list[Bar]:
    count, confidence, accuracy = bins.count.tolist(), bins.confidence.tolist(), bins.outcome.tolist()
    size, total = len(count), sum(count)
    shares = [n / total for n in count]
    return [
        Bar(b / size, (b + 1) / size, confidence[b], accuracy[b], shares[b], shares[b] / highest) for b in range(size) if count[b]
    ]
