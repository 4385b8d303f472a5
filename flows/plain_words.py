"""The result for a reader who does not know the field: what was tried, which is best, and what its confidence is worth."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flows.reliability import Predictions, Reliability, is_drawable
from flows.summary import NONE, SIGNIFICANT, TEMPERATURE, Method, baseline_of, column_of, is_compared, shown

FEW_SEEDS = 5
FEWEST = 30  # predictions below which nothing is said of a confidence
LEVELS = (50, 60, 70, 80, 90)  # per cent, each with what lies within 5 points of it
TOLD = (90, 80, 70, 60, 50)  # the first of these with enough predictions is what the text speaks of
AROUND = {NONE: "as trained", TEMPERATURE: "with the fitted temperature"}
Z = 1.959964  # 95 % of a normal distribution


class Right(NamedTuple):
    """Of 100 predictions with about the same confidence, how many are right, with a 95 % interval; ``count`` predictions were seen."""

    of_100: int
    low: int
    high: int
    count: int


@dataclass(frozen=True)
class PlainWords:
    """Sentences (names marked), and a table: what the classifier says -> how often the best one and the baseline are then right."""

    tried: str
    best: str = ""
    meaning: str = ""
    caveats: Sequence[str] = ()
    names: Sequence[str] = ()  # heads of the columns of ``levels``
    levels: Sequence[tuple[str, Sequence[Right | None]]] = ()


def plain_words(
    summary: pl.DataFrame,
    methods: Sequence[Method],
    reliability: Mapping[str, Reliability],
    *,
    dataset: str,
    classes: int,
    images: int,
    mark: Callable[[str], str] = str,
) -> PlainWords:
    """Say what came out, without a term of the field.

    Args:
        summary: of ``flows.summary.summary_table``.
        methods: those compared.
        reliability: their test predictions; what one without says is left out.
        dataset, classes, images: name (as it is to stand there), number of classes and of test images.
        mark: applied to every name; all the rest is fixed words and numbers.
    """
    seeds = int(summary["count"].max() or 0)  # type: ignore[arg-type]
    tried = (
        f"{_ways(len(methods))} of training a classifier on {dataset} ({classes} classes) "
        f"{'was' if len(methods) == 1 else 'were'} tried, {_times(seeds)}, and measured on {images:,} images that none of them had seen."
    )
    scores = summary.filter(pl.col("metric") == "nll", pl.col("posthoc").is_in([NONE, TEMPERATURE]), pl.col("mean").is_not_null())
    if scores.is_empty():
        return PlainWords(tried)
    name, posthoc = scores.sort("mean", maintain_order=True).select("method", "posthoc").row(0)
    baseline = baseline_of(methods)
    columns = [(name, posthoc)]
    columns += [(baseline, when) for when in AROUND if baseline is not None and (baseline, when) != (name, posthoc)]
    drawn = {column: side for column in columns if (side := _side(reliability.get(column[0]), column[1])) is not None}
    levels = [(f"about {level}\u00a0%", [_right(side, level) for side in drawn.values()]) for level in LEVELS]
    levels.append(("over 95\u00a0%", [_right(side, 97.5, 2.5) for side in drawn.values()]))
    levels = [row for row in levels if any(row[1])]
    heads = [f"{n}, {AROUND[when]}" for n, when in drawn]
    return PlainWords(
        tried,
        _best(summary, methods, name, posthoc, mark),
        _meaning(drawn.get((name, posthoc)), [(n, when, side) for (n, when), side in drawn.items() if n != name], mark),
        _caveats(summary, methods, name, posthoc, seeds, mark),
        heads,
        levels,
    )


def _ways(number: int) -> str:
    return "One way" if number == 1 else f"{number} ways"


def _times(seeds: int) -> str:
    return "once" if seeds <= 1 else f"each {seeds} times with another random start"


def _best(summary: pl.DataFrame, methods: Sequence[Method], name: str, posthoc: str, mark: Callable[[str], str]) -> str:
    """Which is best, and how often it is right beside the baseline."""
    accuracy = shown(summary, name, "accuracy", posthoc)
    right = f" It names the right class in {accuracy.mean} % of the images" if accuracy else ""
    baseline = baseline_of(methods)
    other = shown(summary, str(baseline), "accuracy", posthoc) if baseline not in (None, name) else None
    beside = f", {mark(str(baseline))} in {other.mean} %" if right and other else ""
    if len(methods) == 1:
        return (
            f"{mark(name)} was trained alone, so there is nothing to compare it with.{right}{beside and ''}{'.' if right else ''}"
        )
    lead = f"Best is {mark(name)}, {AROUND[posthoc]}: its probabilities fit what is true better than those of the others (lowest NLL)."
    return f"{lead}{right}{beside}{'.' if right else ''}"


def _meaning(own: Predictions | None, others: Sequence[tuple[str, str, Predictions]], mark: Callable[[str], str]) -> str:
    """What its confidence is worth: how often it is right when it says 90 %, and whether it is too sure on the whole."""
    if own is None:
        return ""
    sentences = []
    told = next(((level, right) for level in TOLD if (right := _right(own, level)) is not None), None)
    if told is not None:
        level, right = told
        beside = [(n, when, found.of_100) for n, when, side in others if (found := _right(side, level)) is not None]
        text = f"When it says {level} % ({level - 5} to {level + 5} %), it is right in {right.of_100} of 100 cases"
        if beside:
            text += f"; when {mark(beside[0][0])} says so, in {' or '.join(f'{of_100} ({AROUND[when]})' for _, when, of_100 in beside)}"
        sentences.append(f"{text}.")
    said, correct = 100 * own.confidence.mean(), 100 * own.correct.mean()
    gap = said - correct
    too = (
        "about as sure as it should be"
        if abs(gap) < 1
        else f"too {'sure' if gap > 0 else 'unsure'} by {abs(gap):.0f} point{'' if round(abs(gap)) == 1 else 's'}"
    )
    sentences.append(f"On the whole it is {too}: it says {said:.0f} % on average and is right in {correct:.0f} %.")
    return " ".join(sentences)


def _caveats(
    summary: pl.DataFrame, methods: Sequence[Method], name: str, posthoc: str, seeds: int, mark: Callable[[str], str]
) -> list[str]:
    """What these figures do not say."""
    found = []
    if seeds <= 1:
        found.append(
            "Each was trained once. Trained again with another random start, the order may change where figures are close."
        )
    elif seeds < FEW_SEEDS:
        found.append(f"{seeds} trainings of each are few: where figures are close, the order may be chance.")
    baseline = baseline_of(methods)
    p = column_of(summary, "nll", posthoc).filter(method=name)["p_holm"]
    if is_compared(summary) and baseline not in (None, name) and len(p) and p[0] is not None:
        value = "less than 0.001" if p[0] < 0.001 else f"{p[0]:.2g}"
        firm = "is more than chance explains" if p[0] < SIGNIFICANT else "may be chance"
        found.append(
            f"That {mark(name)} fits better than {mark(str(baseline))} {firm} (p {'' if p[0] < 0.001 else '= '}{value})."
        )
    if len(methods) > 1:
        found.append("The best one was picked by the same images that it is measured on, which flatters it a little.")
    found.append(
        "All this holds for images like these. On others, worse ones or of something else, it may be wrong and sure of it."
    )
    return found


def _side(pair: Reliability | None, posthoc: str) -> Predictions | None:
    """The predictions before or after temperature scaling, if there are any that are finite."""
    if pair is None or not is_drawable(pair):
        return None
    return pair.after if posthoc == TEMPERATURE else pair.before


def _right(side: Predictions | None, level: float, reach: float = 5) -> Right | None:
    """How often predictions within ``reach`` of ``level`` (per cent) are right; None if there are too few of them."""
    if side is None:
        return None
    confidence: NDArray[np.floating[Any]] = 100 * side.confidence
    inside = (confidence > level - reach) & (confidence <= level + reach)
    count = int(inside.sum())
    if count < FEWEST:
        return None
    seeds = side.confidence.shape[0] if side.confidence.ndim == 2 else 1
    share = float(side.correct[inside].mean())
    low, high = _wilson(share, count / seeds)  # seeds see the same images: they do not count as more of them
    return Right(round(100 * share), round(100 * low), round(100 * high), count)


def _wilson(share: float, number: float) -> tuple[float, float]:
    """Ends of the 95 % score interval of a share (Wilson 1927) that was seen in ``number`` draws."""
    centre = (share + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z / (1 + Z**2 / number) * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    return max(0.0, centre - half), min(1.0, centre + half)
