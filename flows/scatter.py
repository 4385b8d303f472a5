"""Scatter plots as data that a template draws: places in a box, round ticks, words for each point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320.0, 200.0  # of the plotting area, in units of the drawing
MANY_LEVELS = 20.0  # an axis of positive numbers with at least this ratio is logarithmic


@dataclass(frozen=True)
class Dot:
    """A point: its place, the kind that says how it is drawn, and what it is in words."""

    x: float
    y: float
    kind: str
    words: str


@dataclass(frozen=True)
class Scatter:
    """Dots and a line within ``WIDTH`` x ``HEIGHT``, y down; ticks are (place, text)."""

    title: str
    x_label: str
    y_label: str
    dots: Sequence[Dot]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    line: Sequence[tuple[float, float]] = ()


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: Sequence[tuple[float | str, float, str, str]],
    line: Sequence[tuple[float, float]] = (),
) -> Scatter | None:
    """Lay out ``points`` (x, y, kind, words); texts as x are places side by side. None if there is no point.

    ``line`` is (x, y) in the same units, x being numbers.
    """
    points = [point for point in points if math.isfinite(point[1]) and (isinstance(point[0], str) or math.isfinite(point[0]))]
    if not points:
        return None
    names = sorted({x for x, *_ in points if isinstance(x, str)})
    numbers = [float(x) for x, *_ in points if not isinstance(x, str)] + [x for x, _ in line]
    heights = [y for _, y, *_ in points] + [y for _, y in line]
    y_ticks = nice_ticks(min(heights), max(heights))
    if names:
        places = {name: WIDTH * (index + 0.5) / len(names) for index, name in enumerate(names)}
        x_ticks = [(place, name) for name, place in places.items()]
    else:
        places = {}
        is_log = min(numbers) > 0 and max(numbers) / min(numbers) >= MANY_LEVELS
        ticks = _powers(min(numbers), max(numbers)) if is_log else nice_ticks(min(numbers), max(numbers))
        ends = (math.log(ticks[0]), math.log(ticks[-1])) if is_log else (ticks[0], ticks[-1])

    def across(x: float | str) -> float:
        if isinstance(x, str):
            return places[x]
        return WIDTH * ((math.log(x) if is_log else x) - ends[0]) / (ends[1] - ends[0])

    def down(y: float) -> float:
        return HEIGHT * (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    if not names:
        x_ticks = [(across(tick), f"{tick:g}") for tick in ticks]
    return Scatter(
        title,
        x_label,
        y_label,
        [Dot(round(across(x), 1), round(down(y), 1), kind, words) for x, y, kind, words in points],
        [(round(place, 1), text) for place, text in x_ticks],
        [(round(down(tick), 1), f"{tick:g}") for tick in y_ticks],
        [(round(across(x), 1), round(down(y), 1)) for x, y in line],
    )


def nice_ticks(low: float, high: float, include_zero: bool = False) -> list[float]:
    """Return 3 to 7 round numbers, evenly spaced, that enclose ``low`` and ``high``."""
    low = min(low, 0.0) if include_zero else low
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 2)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten that enclose ``low`` and ``high``."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = max(1, -(-(last - first) // 5))
    return [10.0**power for power in range(first, last + step, step)]
