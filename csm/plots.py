"""Pictures of a run for files and trackers: reliability diagram, grid of images (mixed sets, samples), metrics, labels against truth.

Only matplotlib's object interface: no pyplot, so no global state and no display, and safe in a worker. Save a
figure with ``figure.savefig(path)``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from csm.metrics.binning import Bins, bin_samples
from csm.metrics.calibration import mean_gap

BEFORE, AFTER, INK, SOFT, LINE = "#b4500f", "#1b5fa6", "#14202c", "#526070", "#d5dce3"
PALETTE = ("#1b5fa6", "#b4500f", "#0b6b61", "#a03a78", "#7a5b00", "#4b4fb3")


def reliability_diagram(
    confidence: ArrayLike,
    correct: ArrayLike,
    n_bins: int = 15,
    title: str = "",
    after: ArrayLike | None = None,
) -> Figure:
    """Draw accuracy against confidence, and the histogram of confidence (Guo et al., ICML 2017, fig. 1).

    Bars are the accuracy in each bin, hatched boxes the gap to the bin's mean confidence; the ECE written above
    is the sum of those gaps, weighted by the histogram.

    Args:
        confidence: (N,) of the predicted class, in [0, 1].
        correct: (N,) bool, whether the prediction was right.
        n_bins: equal-width bins (lo, hi].
        title: above the diagram.
        after: (N,) confidence of the same predictions after temperature scaling, drawn over it as a line.
            Temperature keeps the predicted class, so ``correct`` holds for it too.

    Raises:
        ValueError: from ``bin_samples``: shapes differ, N is 0, or a confidence is outside [0, 1].
    """
    figure = _figure(4.2, 5.0)
    grid = figure.add_gridspec(2, 1, height_ratios=(5, 1))
    axes = figure.add_subplot(grid[0])
    histogram = figure.add_subplot(grid[1], sharex=axes)

    bins = _bins(confidence, correct, n_bins)
    left, width = np.arange(n_bins) / n_bins, 1 / n_bins
    filled = bins.count.numpy() > 0
    accuracy, mean = bins.outcome.numpy(), bins.confidence.numpy()
    axes.bar(left[filled], accuracy[filled], width, align="edge", color=BEFORE, alpha=0.3, edgecolor="white")
    axes.bar(
        left[filled],
        (mean - accuracy)[filled],
        width,
        bottom=accuracy[filled],
        align="edge",
        facecolor="none",
        edgecolor=BEFORE,
        hatch="////",
        linewidth=0.6,
    )
    axes.plot((0, 1), (0, 1), "--", color=SOFT, linewidth=1)
    _share(histogram, bins, color=BEFORE, alpha=0.3, edgecolor="white")
    text = f"ECE {100 * mean_gap(bins).item():.1f} %"
    if after is not None:
        scaled = _bins(after, correct, n_bins)
        seen = scaled.count.numpy() > 0
        line = scaled.confidence.numpy()[seen], scaled.outcome.numpy()[seen]
        axes.plot(*line, "D-", color=AFTER, markersize=4)
        _share(histogram, scaled, facecolor="none", edgecolor=AFTER)
        text += f", {100 * mean_gap(scaled).item():.1f} % after temperature"
    axes.text(0, 1.02, text, transform=axes.transAxes, color=INK, fontsize=11)  # above: no corner is free of every curve
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes.set_title(title, pad=22)
    axes.tick_params(labelbottom=False)
    histogram.set(xlabel="confidence", ylabel="share")
    return figure


def image_grid(
    images: NDArray[np.uint8],
    row_labels: Sequence[str] = (),
    col_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
) -> Figure:
    """Draw images in rows and columns with hard pixel edges: sets of mixed images, or samples per class.

    Args:
        images: uint8 (R, C, H, W, 1 or 3).
        row_labels: R texts left of the rows, or none.
        col_labels: C texts above the columns, or none.
        captions: R rows of C texts below the images (they may have several lines), or none.
        title: above all.

    Raises:
        ValueError: if ``images`` has another dtype or shape, or a number of texts does not fit.
    """
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 (R, C, H, W, 1 or 3), got {images.dtype} {images.shape}")
    rows, columns, height, width, channels = images.shape
    _check_texts("row_labels", row_labels, rows)
    _check_texts("col_labels", col_labels, columns)
    _check_texts("captions", captions, rows)
    for line in captions:
        _check_texts("each row of captions", line, columns)
    lines = max((text.count("\n") + 1 for line in captions for text in line), default=0)
    figure = _figure(columns + 1.2, (height / width + 0.17 * lines + 0.06) * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            cell: Axes = axes[row, column]
            pixels = images[row, column, ..., 0] if channels == 1 else images[row, column]
            cell.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            cell.set(xticks=(), yticks=())
            cell.spines[:].set_visible(False)
            if captions and captions[row]:
                cell.set_xlabel(captions[row][column], fontsize=8, color=INK, labelpad=2)
            if col_labels and row == 0:
                cell.set_title(col_labels[column], fontsize=9)
        if row_labels:
            axes[row, 0].set_ylabel(row_labels[row], rotation=0, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def metric_bars(methods: Sequence[str], values: Mapping[str, ArrayLike], title: str = "") -> Figure:
    """Draw a panel per metric with a bar per method: mean over seeds, standard deviation, and the seeds as dots.

    Args:
        methods: M names, drawn from top to bottom.
        values: panel label (with its unit) -> (M, S) values of S seeds; nan where a seed is missing.
        title: above all.

    Raises:
        ValueError: if there is no panel or method, or values have another shape.
    """
    if not values or not methods:
        raise ValueError(f"values and methods must not be empty, got {len(values)} and {len(methods)}")
    figure = _figure(1.4 + 3.2 * len(values), 1.0 + 0.36 * len(methods))
    panels = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    place = np.arange(len(methods))
    for index, (panel, (label, raw)) in enumerate(zip(panels, values.items(), strict=True)):
        data = np.asarray(raw, dtype=np.float64)
        if data.ndim != 2 or len(data) != len(methods):
            raise ValueError(f"values[{label!r}] must have shape ({len(methods)}, seeds), got {data.shape}")
        seeds = np.ma.masked_invalid(data)
        mean = seeds.mean(axis=1).filled(np.nan)
        spread = seeds.std(axis=1, ddof=1).filled(0.0) if data.shape[1] > 1 else np.zeros(len(methods))
        panel.barh(place, mean, height=0.62, color=PALETTE[index % len(PALETTE)], alpha=0.35)
        panel.errorbar(mean, place, xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        for seed in data.T:
            panel.plot(seed, place, "o", color=PALETTE[index % len(PALETTE)], markersize=3.5)
        panel.set_title(label, fontsize=10, loc="left")
        panel.grid(axis="x", color=LINE)
        panel.set_axisbelow(True)
    panels[0].set_yticks(place, methods)
    panels[0].invert_yaxis()
    if title:
        figure.suptitle(title)
    return figure


def annotation_plot(
    labels: Mapping[str, ArrayLike], truth: ArrayLike, class_a: ArrayLike, class_b: ArrayLike, title: str = ""
) -> Figure:
    """Draw what each annotator says of mixed images against the known truth; who tells the truth lies on the diagonal.

    Two panels for each annotator: the share of class a among the pair, p_a / (p_a + p_b), and the probability of the class that is truly
    the most probable. The line is the mean of what is said in each of 20 equal bins of the true value, the band holds the middle 80 % of
    it; bins of fewer than 5 images are left out. The shade is where the images of a bin lie (root of their number, relative to the
    fullest cell of the bin, so that bins of few images show too). Above: the mean total variation; in each panel the mean of
    |annotated - true|.

    Args:
        labels: annotator -> its soft labels (N, K), drawn from left to right, at most 5 in a line.
        truth: (N, K), the true posterior.
        class_a, class_b: (N,), integer, the pair of each image.
        title: above all.

    Raises:
        ValueError: there is no annotator or image, or shapes differ.
    """
    true, a, b = np.asarray(truth, dtype=np.float64), np.asarray(class_a), np.asarray(class_b)
    if not labels or true.ndim != 2 or len(true) == 0 or a.shape != (len(true),) or b.shape != a.shape:
        raise ValueError(
            f"labels and images must not be empty, classes (N,), got {len(labels)}, {true.shape}, {a.shape}, {b.shape}"
        )
    row, top = np.arange(len(true)), true.argmax(axis=1)
    columns = min(5, len(labels))
    lines = -(-len(labels) // columns)
    figure = _figure(2.1 * columns + 0.5, 4.5 * lines + (0.35 if title else 0.1))
    panels = figure.subplots(2 * lines, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat:
        panel.set_visible(False)
    for index, (name, raw) in enumerate(labels.items()):
        said = np.asarray(raw, dtype=np.float64)
        if said.shape != true.shape:
            raise ValueError(f"labels[{name!r}] must have the shape of truth, {true.shape}, got {said.shape}")
        line, column = divmod(index, columns)
        upper, lower = panels[2 * line, column], panels[2 * line + 1, column]
        both = (said[row, a] + said[row, b] > 0) & (true[row, a] + true[row, b] > 0)
        share, said_share = (values[row, a][both] / (values[row, a] + values[row, b])[both] for values in (true, said))
        _against(upper, share, said_share, AFTER)
        _against(lower, true[row, top], said[row, top], BEFORE)
        upper.set_title(f"{name}\nTV {0.5 * np.abs(said - true).sum(axis=1).mean():.3f}", fontsize=10)
        if column == 0:
            upper.set_ylabel("annotated share of a", fontsize=8)
            lower.set_ylabel("annotated prob. of top class", fontsize=8)
        upper.set_xlabel("true share of a", fontsize=8)
        lower.set_xlabel("true prob. of top class", fontsize=8)
    figure.supxlabel("line: mean, band: middle 80 %", fontsize=8, color=SOFT)
    if title:
        figure.suptitle(title)
    return figure


def _against(axes: Axes, true: NDArray[np.float64], said: NDArray[np.float64], color: str) -> None:
    """Shade, mean and middle 80 % of ``said`` in each bin of ``true``, both (N,) in [0, 1]."""
    bins, enough = 20, 5
    edges = np.linspace(0, 1, bins + 1)
    counts, _, _ = np.histogram2d(true, said, (edges, np.linspace(0, 1, 2 * bins + 1)))  # (true, said)
    full = counts.sum(axis=1) >= enough
    shade = np.where(full[:, None], np.sqrt(counts / counts.max(axis=1, keepdims=True).clip(min=1)), 0)
    colors = LinearSegmentedColormap.from_list("", ("white", color))
    axes.imshow(
        shade.T, cmap=colors, vmin=0, vmax=1.6, origin="lower", extent=(0, 1, 0, 1), aspect="equal", interpolation="nearest"
    )
    axes.plot((0, 1), (0, 1), "--", color=INK, linewidth=1)
    where = np.clip(np.digitize(true, edges) - 1, 0, bins - 1)
    low, mean, high = np.full((3, bins), np.nan)
    for index in np.flatnonzero(full):
        low[index], high[index] = np.quantile(said[where == index], (0.1, 0.9))
        mean[index] = said[where == index].mean()
    centre = (edges[:-1] + edges[1:]) / 2
    axes.fill_between(centre, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(centre, np.stack([low, high], axis=1), color=color, linewidth=0.7)
    axes.plot(centre, mean, color=color, linewidth=2.2)
    if len(true):
        text = f"off by {np.abs(said - true).mean():.3f}"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
        axes.text(0.04, 0.95, text, transform=axes.transAxes, va="top", fontsize=8, color=INK, bbox=box)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), visible=True)
    axes.tick_params(labelsize=8, labelbottom=True)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _check_texts(name: str, texts: Sequence[object], expected: int) -> None:
    if len(texts) not in (0, expected):
        raise ValueError(f"{name} must have {expected} entries or none, got {len(texts)}")


def _bins(confidence: ArrayLike, correct: ArrayLike, n_bins: int) -> Bins:
    return bin_samples(
        torch.from_numpy(np.asarray(confidence, dtype=np.float64)),
        torch.from_numpy(np.asarray(correct, dtype=np.float64)),
        n_bins,
    )


def _share(axes: Axes, bins: Bins, **style: Any) -> None:
    count = bins.count.numpy()
    axes.bar(np.arange(len(count)) / len(count), count / count.sum(), 1 / len(count), align="edge", **style)
