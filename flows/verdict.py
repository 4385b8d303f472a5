"""What a run's metrics say, in sentences."""

from collections.abc import Callable, Sequence

import polars as pl

from flows.summary import (
    COLUMNS,
    NONE,
    SIGNIFICANT,
    TEMPERATURE,
    Method,
    Shown,
    baseline_of,
    column_of,
    is_compared,
    select,
    shown,
    summary_table,
)

WHEN = {NONE: "before", TEMPERATURE: "after"}
FEW = 5  # seeds below which p-values come with a warning
NAMED = 6  # methods that a sentence names; more are only counted


def verdict(
    metrics: pl.DataFrame,
    methods: Sequence[Method],
    comparison: pl.DataFrame | None = None,
    *,
    split: str = "test",
    n_bins: int = 15,
    mark: Callable[[str], str] = str,
) -> list[str]:
    """Say in sentences which method has the lowest NLL and ECE, next to the baseline, which differ significantly, and how our own do.

    Args:
        metrics: as for ``select``, like ``split`` and ``n_bins``.
        methods: those compared.
        comparison: as for ``summary_table``.
        mark: applied to every method name (emphasis, escaping); all the rest is fixed words and numbers.
    """
    rows = select(metrics, methods, split, n_bins)
    summary = summary_table(metrics, methods, comparison, split=split, n_bins=n_bins)
    sentences = [_lowest(rows, summary, methods, posthoc, mark) for posthoc in WHEN]
    sentences += [_significant(summary, methods, posthoc, mark) for posthoc in WHEN]
    sentences += [_own(summary, methods, mark), _raised(summary)]
    if summary["count"].max() == 1:
        told = "intervals tell of chance in the test images alone, and no difference is tested" if is_compared(summary) else ""
        told = told or "small differences may be chance"
        sentences.append(f"Each method was trained with one seed only, so {told}.")
    elif summary["p_holm"].count() and summary["count"].max() < FEW:  # type: ignore[operator]
        few = summary["count"].max()
        sentences.append(f"With {few} seeds the spread between trainings is known only roughly: p-values near 0.05 mean little.")
    return [sentence for sentence in sentences if sentence]


def _lowest(
    rows: pl.DataFrame,
    summary: pl.DataFrame,
    methods: Sequence[Method],
    posthoc: str,
    mark: Callable[[str], str],
) -> str:
    """Say which method has the lowest NLL and which the lowest ECE, before or after temperature scaling."""
    baseline = baseline_of(methods)
    clauses: list[str] = []
    subject: list[str] = []
    for metric in ("nll", "ece"):
        figures = {m.name: f for m in methods if (f := shown(summary, m.name, metric, posthoc)) is not None}
        winners = [name for name, figure in figures.items() if figure.best]
        if not winners:
            continue
        verb = "has" if len(winners) == 1 else "have"
        who = _join([mark(name) for name in winners]) if len(winners) <= NAMED else f"{len(winners)} methods"
        opening = "" if winners == subject else f"{who} {verb} "
        clause = f"{opening}the lowest {_label(metric)}, {_value(figures[winners[0]], metric)}"
        if baseline in winners and len(winners) == 1:
            clause += " (it is the baseline itself)"
        elif baseline in figures and baseline not in winners:
            name = "" if clauses else f" for {mark(baseline)}"
            notes = [_seeds_won(rows, winners[0], baseline, metric, posthoc), _chance(summary, winners, metric, posthoc)]
            note = ", ".join(filter(None, notes))
            clause += f" against {_value(figures[baseline], metric, unit=False)}{name}" + (f" ({note})" if note else "")
        clauses.append(clause)
        subject = winners
    if not clauses:
        return ""
    return f"{WHEN[posthoc].capitalize()} temperature scaling, {', and '.join(clauses)}."


def _seeds_won(rows: pl.DataFrame, method: str, baseline: str, metric: str, posthoc: str) -> str:
    cells = column_of(rows, metric, posthoc).select("method", "seed", "value")
    pairs = cells.filter(pl.col("method") == method).join(cells.filter(pl.col("method") == baseline), on="seed")
    lower, seeds = int((pairs["value"] < pairs["value_right"]).sum()), len(pairs)
    if seeds < 2:
        return ""
    return f"lower with all {seeds} seeds" if lower == seeds else f"lower with {lower} of {seeds} seeds"


def _chance(summary: pl.DataFrame, winners: Sequence[str], metric: str, posthoc: str) -> str:
    """The p-value of the one winner against the baseline, if they were compared."""
    p = column_of(summary, metric, posthoc).filter(pl.col("method").is_in(winners))["p_holm"]
    if len(p) != 1 or p[0] is None:
        return ""
    value = "p < 0.001" if p[0] < 0.001 else f"p = {p[0]:.2g}"
    return value if p[0] < SIGNIFICANT else f"not significant, {value}"


def _significant(summary: pl.DataFrame, methods: Sequence[Method], posthoc: str, mark: Callable[[str], str]) -> str:
    """Say which methods differ significantly from the baseline in NLL and ECE."""
    baseline = baseline_of(methods)
    clauses = []
    for metric in ("nll", "ece"):
        column = column_of(summary, metric, posthoc).filter(pl.col("p_holm").is_not_null())
        if baseline is None or column.is_empty():
            continue
        differs = column.filter(pl.col("p_holm") < SIGNIFICANT)
        lower, higher = (
            differs.filter(side)["method"].to_list() for side in (pl.col("difference") < 0, pl.col("difference") > 0)
        )
        sides = [f"{word} with {_named(names, mark)}" for word, names in (("lower", lower), ("higher", higher)) if names]
        clauses.append(f"{_label(metric)} is {' and '.join(sides) or 'neither lower nor higher with any'} of {len(column)}")
    if not clauses:
        return ""
    opening = f"Next to {mark(str(baseline))}, {WHEN[posthoc]} temperature scaling and beyond chance (p < {SIGNIFICANT:g})"
    return f"{opening}, {', and '.join(clauses)}."


def _named(names: Sequence[str], mark: Callable[[str], str]) -> str:
    return f"{len(names)} ({_join([mark(name) for name in names])})" if len(names) <= NAMED else str(len(names))


def _own(summary: pl.DataFrame, methods: Sequence[Method], mark: Callable[[str], str]) -> str:
    """Say in how many of the four comparisons a method of ours comes first, and its place in the others."""
    won: list[str] = []
    lost: list[str] = []
    own = [method.name for method in methods if method.is_ours]
    for posthoc, when in WHEN.items():
        for metric in ("nll", "ece"):
            column = column_of(summary, metric, posthoc).filter(pl.col("rank").is_not_null())
            mine = column.filter(pl.col("method").is_in(own)).sort("rank", maintain_order=True)
            if mine.is_empty() or len(mine) == len(column):
                continue
            name, rank = mine.select("method", "rank").row(0)
            place = f"{_label(metric)} {when}"
            if rank == 1:
                won.append(place)
            else:
                figure = shown(summary, name, metric, posthoc)
                assert figure is not None
                place = f"in {place}, {mark(name)} is {_ordinal(rank)} of {len(column)}"
                lost.append(f"{place} ({_value(figure, metric)})")
    total = len(won) + len(lost)
    if not total:
        return ""
    if not lost:
        return f"So semantic mixing comes first in all {total} comparisons."
    opening = (
        f"So semantic mixing comes first in {len(won)} of {total} comparisons ({_join(won)})"
        if won
        else f"So semantic mixing comes first in none of {total} comparisons"
    )
    return f"{opening}; {_join(lost)}."


def _raised(summary: pl.DataFrame) -> str:
    pairs = column_of(summary, "ece", NONE).join(column_of(summary, "ece", TEMPERATURE), on="method")
    raised = int((pairs["mean_right"] > pairs["mean"]).sum())
    if not raised:
        return ""
    return f"Temperature scaling raises the ECE of {raised} of {len(pairs)} methods."


def _label(metric: str) -> str:
    return next(column.label for column in COLUMNS if column.metric == metric)


def _value(figure: Shown, metric: str, unit: bool = True) -> str:
    """Write ``4.0 ± 0.9 %`` or, with ``unit``, ``76.5 ± 6.5 (×100)``."""
    sign = next(column.unit for column in COLUMNS if column.metric == metric)
    if sign == "%":
        return f"{figure} %"
    return f"{figure} ({sign})" if unit else str(figure)


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
