"""What a run's metrics say: means over seeds, the best per column, the verdict in words, a terminal table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Method:
    """A way of training that the run compared.

    Attributes:
        name: as in the column ``method`` of the metrics.
        description: a few words on what it is trained with.
        is_ours: whether it is the product's own (trained on semantic mixtures).
        is_baseline: whether the verdict compares the others with it (cross-entropy); one method at most.
    """

    name: str
    description: str
    is_ours: bool = False
    is_baseline: bool = False


class Column(NamedTuple):
    """A metric as the tables show it: times 100, with the unit ``%`` or, if that is no percentage, ``×100``."""

    metric: str
    label: str
    unit: str
    better: Literal["higher", "lower"]

    @property
    def arrow(self) -> str:
        return "↑" if self.better == "higher" else "↓"


class Shown(NamedTuple):
    """A number as it is shown: ``std`` is "" with one seed; equal ``mean`` texts share a rank (1 is best)."""

    mean: str
    std: str
    rank: int
    best: bool

    def __str__(self) -> str:
        return f"{self.mean} ± {self.std}" if self.std else self.mean


COLUMNS = (
    Column("accuracy", "Accuracy", "%", "higher"),
    Column("ece", "ECE", "%", "lower"),
    Column("aece", "AECE", "%", "lower"),
    Column("nll", "NLL", "×100", "lower"),
    Column("brier", "Brier", "×100", "lower"),
)


def select(metrics: pl.DataFrame, methods: Sequence[Method], split: str = "test", n_bins: int = 15) -> pl.DataFrame:
    """Return the rows that the report is about: one per (method, seed, fitted, metric of ``COLUMNS``).

    Args:
        metrics: columns of ``csm.tables.METRICS``; values as fractions.
        methods: those to keep.
        split: the split to report.
        n_bins: which rows to take of a metric that was measured with several numbers of bins.

    Raises:
        ValueError: if a method measured the same thing twice with one seed, which would falsify its spread.
    """
    key = ["method", "seed", "fitted", "metric"]
    rows = metrics.filter(
        pl.col("split").cast(pl.String) == split,
        pl.col("bins").is_null() | (pl.col("bins") == n_bins),
        pl.col("metric").is_in([column.metric for column in COLUMNS]),
        pl.col("method").is_in([method.name for method in methods]),
    )
    twice = rows.filter(rows.select(key).is_duplicated())
    if len(twice):
        raise ValueError(f"metrics: expected one row per {key}, got several for {twice.select(key).row(0)}")
    return rows


def summary_table(metrics: pl.DataFrame, methods: Sequence[Method], *, split: str = "test", n_bins: int = 15) -> pl.DataFrame:
    """Summarise ``metrics`` over seeds (arguments as for ``select``).

    Returns:
        One row per (method, metric, fitted), methods in the given order: ``mean``, ``std`` (n - 1 in the
        denominator; null with one seed), ``count`` (seeds), ``rank`` (1 is best, among all methods in that
        column, after rounding as ``shown`` does) and ``best`` (rank 1 among at least two). Mean, std and rank
        are null where a seed gave a value that is not finite. The fitted temperatures are the rows with metric
        ``temperature``, without a rank. Fractions, not percentages.
    """
    rows = select(metrics, methods, split, n_bins)
    temperatures = (
        rows.filter("fitted")
        .group_by("method", "seed", "fitted")
        .agg(value=pl.col("temperature").first().cast(pl.Float64))
        .with_columns(metric=pl.lit("temperature"))
    )
    finite = pl.col("value").is_finite().fill_null(False).all()
    method_order = pl.Enum([method.name for method in methods])
    metric_order = pl.Enum([*(column.metric for column in COLUMNS), "temperature"])
    columns = ["method", "metric", "fitted", "value"]
    summary = (
        pl.concat([rows.select(columns), temperatures.select(columns)])
        .group_by("method", "metric", "fitted")
        .agg(
            mean=pl.when(finite).then(pl.col("value").mean()),
            std=pl.when(finite).then(pl.col("value").std()),
            count=pl.len(),
        )
        .sort(pl.col("method").cast(method_order), "fitted", pl.col("metric").cast(metric_order))
    )
    seen = {metric: decimals(summary, metric) for metric in summary["metric"].unique()}
    rounded = [
        None if mean is None else float(f"{100 * mean:.{seen[metric]}f}")
        for metric, mean in summary.select("metric", "mean").iter_rows()
    ]
    column = ["metric", "fitted"]
    rank = pl.when(pl.col("metric") == "accuracy").then(-pl.col("rounded")).otherwise(pl.col("rounded"))
    return (
        summary.with_columns(rounded=pl.Series(rounded, dtype=pl.Float64))
        .with_columns(rank=pl.when(pl.col("metric") != "temperature").then(rank.rank("min").over(column)))
        .with_columns(best=(pl.col("rank") == 1).fill_null(False) & (pl.col("rank").count().over(column) > 1))
        .with_columns(pl.col("rank").cast(pl.UInt32))
        .drop("rounded")
    )


def decimals(summary: pl.DataFrame, metric: str) -> int:
    """Return the decimals that ``metric``, times 100, is shown with: 2 if a mean is below 1, else 1."""
    smallest = summary.filter(pl.col("metric") == metric)["mean"].min()
    return 2 if isinstance(smallest, float) and smallest < 0.01 else 1


def shown(summary: pl.DataFrame, method: str, metric: str, fitted: bool) -> Shown | None:
    """Return a result times 100 (``temperature``: as it is, two decimals), or None if it has no value."""
    row = _column(summary, metric, fitted).filter(pl.col("method") == method)
    if row.is_empty() or row["mean"][0] is None:
        return None
    scale, places = (1, 2) if metric == "temperature" else (100, decimals(summary, metric))
    mean, std, rank, best = row.select("mean", "std", "rank", "best").row(0)
    spread = "" if std is None else f"{scale * std:.{places}f}"
    return Shown(f"{scale * mean:.{places}f}", spread, rank or 0, best)


def _column(frame: pl.DataFrame, metric: str, fitted: bool) -> pl.DataFrame:
    return frame.filter(pl.col("metric") == metric, pl.col("fitted") == fitted)


def terminal_table(summary: pl.DataFrame, methods: Sequence[Method]) -> Table:
    """Return the results as a table for terminals of 80 columns and more.

    The upper half is without temperature, the lower half with the fitted one; the best of a column in each
    half is bold and marked ``*``.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("T", justify="right", no_wrap=True)
    for column in COLUMNS:
        table.add_column(f"{column.label} {column.arrow}\n{column.unit}", justify="right", no_wrap=True)
    for fitted in (False, True):
        if fitted:
            table.add_section()
        for method in methods:
            fit = shown(summary, method.name, "temperature", True)
            temperature = Text((fit.mean if fit else "-") if fitted else "1")
            values = [_cell(summary, method.name, column.metric, fitted) for column in COLUMNS]
            table.add_row(Text(method.name, style="cyan" if method.is_ours else ""), temperature, *values)
    spread = "mean±standard deviation over seeds" if summary["std"].count() else "one seed"
    table.caption = Text(f"{spread}; * best; T = 1: no temperature scaling")
    return table


def _cell(summary: pl.DataFrame, method: str, metric: str, fitted: bool) -> Text:
    figure = shown(summary, method, metric, fitted)
    if figure is None:
        return Text("- ", style="dim")
    text = f"{figure.mean}±{figure.std}" if figure.std else figure.mean
    return Text(text + ("*" if figure.best else " "), style="bold" if figure.best else "")


def verdict(
    metrics: pl.DataFrame,
    methods: Sequence[Method],
    *,
    split: str = "test",
    n_bins: int = 15,
    mark: Callable[[str], str] = str,
) -> list[str]:
    """Say in sentences which method has the lowest NLL and ECE, next to the baseline, and how our own do.

    Args:
        metrics: as for ``select``, like ``split`` and ``n_bins``.
        methods: those compared.
        mark: applied to every method name (emphasis, escaping); all the rest is fixed words and numbers.
    """
    rows = select(metrics, methods, split, n_bins)
    summary = summary_table(metrics, methods, split=split, n_bins=n_bins)
    sentences = [_lowest(rows, summary, methods, fitted, mark) for fitted in (False, True)]
    sentences += [_own(summary, methods, mark), _raised(summary)]
    if summary["count"].max() == 1:
        sentences.append("Each method was trained with one seed only, so small differences may be chance.")
    return [sentence for sentence in sentences if sentence]


def _lowest(
    rows: pl.DataFrame,
    summary: pl.DataFrame,
    methods: Sequence[Method],
    fitted: bool,
    mark: Callable[[str], str],
) -> str:
    """Say which method has the lowest NLL and which the lowest ECE, before or after temperature scaling."""
    baseline = next((method.name for method in methods if method.is_baseline), None)
    clauses: list[str] = []
    subject: list[str] = []
    for metric in ("nll", "ece"):
        figures = {m.name: f for m in methods if (f := shown(summary, m.name, metric, fitted)) is not None}
        winners = [name for name, figure in figures.items() if figure.best]
        if not winners:
            continue
        verb = "has" if len(winners) == 1 else "have"
        opening = "" if winners == subject else f"{_join([mark(name) for name in winners])} {verb} "
        clause = f"{opening}the lowest {_label(metric)}, {_value(figures[winners[0]], metric)}"
        if baseline in winners and len(winners) == 1:
            clause += " (it is the baseline itself)"
        elif baseline in figures and baseline not in winners:
            name = "" if clauses else f" for {mark(baseline)}"
            won = _seeds_won(rows, winners[0], baseline, metric, fitted)
            clause += f" against {_value(figures[baseline], metric, unit=False)}{name}{won}"
        clauses.append(clause)
        subject = winners
    if not clauses:
        return ""
    return f"{'After' if fitted else 'Before'} temperature scaling, {', and '.join(clauses)}."


def _seeds_won(rows: pl.DataFrame, method: str, baseline: str, metric: str, fitted: bool) -> str:
    cells = _column(rows, metric, fitted).select("method", "seed", "value")
    pairs = cells.filter(pl.col("method") == method).join(cells.filter(pl.col("method") == baseline), on="seed")
    lower, seeds = int((pairs["value"] < pairs["value_right"]).sum()), len(pairs)
    if seeds < 2:
        return ""
    return f" (lower with all {seeds} seeds)" if lower == seeds else f" (lower with {lower} of {seeds} seeds)"


def _own(summary: pl.DataFrame, methods: Sequence[Method], mark: Callable[[str], str]) -> str:
    """Say in how many of the four comparisons a method of ours comes first, and its place in the others."""
    won: list[str] = []
    lost: list[str] = []
    own = [method.name for method in methods if method.is_ours]
    for fitted, metric in ((False, "nll"), (False, "ece"), (True, "nll"), (True, "ece")):
        column = _column(summary, metric, fitted).filter(pl.col("rank").is_not_null())
        mine = column.filter(pl.col("method").is_in(own)).sort("rank", maintain_order=True)
        if mine.is_empty() or len(mine) == len(column):
            continue
        name, rank = mine.select("method", "rank").row(0)
        place = f"{_label(metric)} {'after' if fitted else 'before'}"
        if rank == 1:
            won.append(place)
        else:
            figure = shown(summary, name, metric, fitted)
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
    pairs = _column(summary, "ece", False).join(_column(summary, "ece", True), on="method")
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
