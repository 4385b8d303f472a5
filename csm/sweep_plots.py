"""Pictures of a sweep: its progress, its Pareto front, where good trials lie, and which settings mattered. See ``csm.plots``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from csm.plots import AFTER, BEFORE, INK, LINE, PALETTE, SOFT, _figure

WORST = 0.05  # the share of trials, the worst ones, that an axis leaves out: one that diverged would flatten all others


def objective_history(numbers: Sequence[int], values: ArrayLike, label: str, is_higher_better: bool = False) -> Figure:
    """Draw each trial's objective against its number, and the best one so far.

    Args:
        numbers: of N trials that were done, N >= 1, in their order.
        values: (N,), the objective.
        label: of the objective.
        is_higher_better: whether the best one is the highest.

    Raises:
        ValueError: there is no trial, or shapes differ.
    """
    objective = np.asarray(values, dtype=np.float64)
    if objective.shape != (len(numbers),) or not len(numbers):
        raise ValueError(f"values must have shape ({len(numbers)},), at least 1, got {objective.shape}")
    figure = _figure(6.4, 3.4)
    axes = figure.subplots()
    best = np.maximum.accumulate(objective) if is_higher_better else np.minimum.accumulate(objective)
    axes.plot(numbers, objective, "o", color=AFTER, alpha=0.6, markersize=5, label="trial")
    axes.step(numbers, best, where="post", color=BEFORE, linewidth=1.6, label="best so far")
    _focus(axes, objective, is_higher_better)
    axes.set(xlabel="trial", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=LINE)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return figure


def pareto_plot(x: ArrayLike, y: ArrayLike, is_on_front: Sequence[bool], labels: tuple[str, str], names: Sequence[str]) -> Figure:
    """Draw two metrics of trials against each other, the Pareto front named and joined.

    Args:
        x, y: (N,), N >= 1.
        is_on_front: N.
        labels: of the axes.
        names: N, of the trials.

    Raises:
        ValueError: there is no trial, or shapes differ.
    """
    across, up, is_on = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), np.asarray(is_on_front, dtype=bool)
    if (
        across.ndim != 1
        or not len(across)
        or up.shape != across.shape
        or is_on.shape != across.shape
        or len(names) != len(across)
    ):
        raise ValueError(
            f"x, y, is_on_front and names must have the same length > 0, got {across.shape}, {up.shape}, {is_on.shape}"
        )
    figure = _figure(5.2, 4.4)
    axes = figure.subplots()
    axes.plot(across[~is_on], up[~is_on], "o", color=SOFT, alpha=0.55, markersize=5, label="trial")
    order = np.flatnonzero(is_on)[np.argsort(across[is_on], kind="stable")]
    axes.plot(across[order], up[order], "o-", color=BEFORE, markersize=6, linewidth=1.2, label="Pareto front")
    for index in order:
        axes.annotate(names[index], (across[index], up[index]), (4, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(color=LINE)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return figure


def slices(parameters: Mapping[str, Sequence[Any]], values: ArrayLike, label: str, is_higher_better: bool = False) -> Figure:
    """Draw the objective against each setting, a panel for each: numbers on an axis, which is logarithmic if they span a factor of 20.

    Args:
        parameters: setting -> N values, null where a trial did not have it.
        values: (N,), the objective, N >= 1.
        label: of the objective.
        is_higher_better: whether the best trial, drawn larger, is the highest.

    Raises:
        ValueError: there is no setting or trial, or numbers of values differ.
    """
    objective = np.asarray(values, dtype=np.float64)
    if not parameters or objective.ndim != 1 or not len(objective):
        raise ValueError(f"parameters and values must not be empty, got {len(parameters)} and {objective.shape}")
    columns = min(3, len(parameters))
    lines = -(-len(parameters) // columns)
    figure = _figure(3.1 * columns + 0.3, 2.7 * lines + 0.2)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(parameters) :]:
        panel.set_visible(False)
    best = int(objective.argmax() if is_higher_better else objective.argmin())
    for panel, (name, raw) in zip(panels.flat, parameters.items(), strict=False):
        if len(raw) != len(objective):
            raise ValueError(f"parameters[{name!r}] must have {len(objective)} values, got {len(raw)}")
        had = [index for index, value in enumerate(raw) if value is not None]
        places = _places(panel, [raw[index] for index in had])
        panel.plot(places, objective[had], "o", color=AFTER, alpha=0.55, markersize=5)
        if best in had:
            panel.plot(places[had.index(best)], objective[best], "o", color=BEFORE, markersize=8)
        panel.set_xlabel(name, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(color=LINE)
        panel.set_axisbelow(True)
    _focus(panels[0, 0], objective, is_higher_better)
    for line in panels:
        line[0].set_ylabel(label, fontsize=9)
    return figure


def importance_bars(shares: Mapping[str, float], label: str) -> Figure:
    """Draw the share of the objective's variance that each setting explains, from top to bottom.

    Raises:
        ValueError: there is no setting.
    """
    if not shares:
        raise ValueError("shares must not be empty")
    figure = _figure(6.4, 0.9 + 0.34 * len(shares))
    axes = figure.subplots()
    place = np.arange(len(shares))
    axes.barh(place, list(shares.values()), height=0.6, color=PALETTE[0], alpha=0.7)
    for index, share in enumerate(shares.values()):
        axes.text(share + 0.01, index, f"{share:.2f}", va="center", fontsize=8, color=INK)
    axes.set_yticks(place, list(shares), fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, max(1.0, 1.1 * max(shares.values()))), xlabel=label)
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    return figure


def _places(panel: Axes, values: Sequence[Any]) -> list[float]:
    """Where ``values`` lie on the panel's x axis, which is made to fit."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if values and min(values) > 0 and max(values) / min(values) >= 20:
            panel.set_xscale("log")
        return [float(value) for value in values]
    names = sorted({str(value) for value in values})
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.5, len(names) - 0.5)
    return [float(names.index(str(value))) for value in values]


def _focus(axes: Axes, values: np.ndarray[Any, np.dtype[np.float64]], is_higher_better: bool) -> None:
    """Leave the worst trials out of sight if they would take more than half of the axis."""
    low, high = float(values.min()), float(values.max())
    bad = float(np.quantile(values, WORST if is_higher_better else 1 - WORST))
    span = abs((high if is_higher_better else low) - bad)
    if high - low > 2 * span > 0 and math.isfinite(span):
        axes.set_ylim((bad - 0.1 * span, high + 0.1 * span) if is_higher_better else (low - 0.1 * span, bad + 0.1 * span))
