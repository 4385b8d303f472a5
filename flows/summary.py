"""What a run's metrics say: means over seeds, the best of each column, and what differs from the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import polars as pl

from csm import tables

NONE, TEMPERATURE = "none", "temperature"  # of csm.posthoc.POSTHOC: as trained, and what every table shows beside it
SIGNIFICANT = 0.05  # Holm-corrected p below which a difference to the baseline is marked


@dataclass(frozen=True)
class Method:
    """A way of training that the run compared.

    Attributes:
        name: as in the column ``method`` of the metrics.
        description: a few words on what it is trained with.
        is_ours: whether it is the product's own (trained on semantic mixtures).
        is_baseline: whether the others are compared with it (cross-entropy); one method at most.
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
    """A number as it is shown.

    ``std`` is "" with one seed, ``low`` and ``high``, the ends of its interval, are "" and ``half``, half its width, is "" where none was
    computed; equal ``mean`` texts share a rank (1 is best); ``differs``: significantly, from the baseline.
    """

    mean: str
    std: str
    rank: int
    best: bool
    low: str = ""
    high: str = ""
    half: str = ""
    differs: bool = False

    def __str__(self) -> str:
        return f"{self.mean} ± {self.std}" if self.std and not self.half else self.mean


COLUMNS = (
    Column("accuracy", "Accuracy", "%", "higher"),
    Column("ece", "ECE", "%", "lower"),
    Column("aece", "AECE", "%", "lower"),
    Column("nll", "NLL", "×100", "lower"),
    Column("brier", "Brier", "×100", "lower"),
)


def select(metrics: pl.DataFrame, methods: Sequence[Method], split: str = "test", n_bins: int = 15) -> pl.DataFrame:
    """Return the rows that the report is about: one per (method, seed, posthoc, metric of ``COLUMNS``).

    Args:
        metrics: columns of ``csm.tables.METRICS``; values as fractions.
        methods: those to keep.
        split: the split to report.
        n_bins: which rows to take of a metric that was measured with several numbers of bins.

    Raises:
        ValueError: if a method measured the same thing twice with one seed, which would falsify its spread.
    """
    key = ["method", "seed", "posthoc", "metric"]
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


def baseline_of(methods: Sequence[Method]) -> str | None:
    """Name of the method that the others are compared with, if it is among them."""
    return next((method.name for method in methods if method.is_baseline), None)


def summary_table(
    metrics: pl.DataFrame,
    methods: Sequence[Method],
    comparison: pl.DataFrame | None = None,
    *,
    split: str = "test",
    n_bins: int = 15,
) -> pl.DataFrame:
    """Summarise ``metrics`` over seeds (arguments as for ``select``).

    Args:
        comparison: columns of ``csm.tables.COMPARISON``; None: nothing is compared.

    Returns:
        One row per (method, metric, posthoc), methods in the given order: ``mean``, ``std`` (n - 1 in the
        denominator; null with one seed), ``count`` (seeds), ``rank`` (1 is best, among all methods in that
        column, after rounding as ``shown`` does) and ``best`` (rank 1 among at least two); from ``comparison``
        ``low``, ``high``, ``difference`` and ``p_holm``, null where it has none. Mean, std and rank
        are null where a seed gave a value that is not finite. The fitted temperatures are the rows with metric
        ``temperature``, without a rank. Fractions, not percentages.
    """
    rows = select(metrics, methods, split, n_bins)
    temperatures = (
        rows.filter(posthoc=TEMPERATURE)
        .group_by("method", "seed", "posthoc")
        .agg(value=pl.col("temperature").first().cast(pl.Float64))
        .with_columns(metric=pl.lit("temperature"))
    )
    finite = pl.col("value").is_finite().fill_null(False).all()
    method_order = pl.Enum([method.name for method in methods])
    metric_order = pl.Enum([*(column.metric for column in COLUMNS), "temperature"])
    columns = ["method", "metric", "posthoc", "value"]
    summary = (
        pl.concat([rows.select(columns), temperatures.select(columns)])
        .group_by("method", "metric", "posthoc")
        .agg(
            mean=pl.when(finite).then(pl.col("value").mean()),
            std=pl.when(finite).then(pl.col("value").std()),
            count=pl.len(),
        )
        .sort(pl.col("method").cast(method_order), pl.col("posthoc") != NONE, "posthoc", pl.col("metric").cast(metric_order))
    )
    seen = {metric: decimals(summary, metric) for metric in summary["metric"].unique()}
    rounded = [
        None if mean is None else float(f"{100 * mean:.{seen[metric]}f}")
        for metric, mean in summary.select("metric", "mean").iter_rows()
    ]
    column = ["metric", "posthoc"]
    rank = pl.when(pl.col("metric") == "accuracy").then(-pl.col("rounded")).otherwise(pl.col("rounded"))
    found = pl.DataFrame(schema=dict(tables.COMPARISON)) if comparison is None else comparison
    return (
        summary.with_columns(rounded=pl.Series(rounded, dtype=pl.Float64))
        .with_columns(rank=pl.when(pl.col("metric") != "temperature").then(rank.rank("min").over(column)))
        .with_columns(best=(pl.col("rank") == 1).fill_null(False) & (pl.col("rank").count().over(column) > 1))
        .with_columns(pl.col("rank").cast(pl.UInt32))
        .drop("rounded")
        .join(found.drop("mean"), on=["method", "metric", "posthoc"], how="left", maintain_order="left")
        .select([*summary.columns, "rank", "best", "low", "high", "difference", "p_holm"])
    )


def decimals(summary: pl.DataFrame, metric: str) -> int:
    """Return the decimals that ``metric``, times 100, is shown with: 2 if a mean is below 1, else 1."""
    smallest = summary.filter(pl.col("metric") == metric)["mean"].min()
    return 2 if isinstance(smallest, float) and smallest < 0.01 else 1


def shown(summary: pl.DataFrame, method: str, metric: str, posthoc: str) -> Shown | None:
    """Return a result times 100 (``temperature``: as it is, two decimals), or None if it has no value."""
    found = column_of(summary, metric, posthoc).filter(pl.col("method") == method)
    if found.is_empty() or found["mean"][0] is None:
        return None
    scale, places = (1, 2) if metric == "temperature" else (100, decimals(summary, metric))
    row = found.row(0, named=True)

    def text(value: float | None) -> str:
        return "" if value is None else f"{scale * value:.{places}f}"

    half = None if row["low"] is None else (row["high"] - row["low"]) / 2
    differs = row["p_holm"] is not None and row["p_holm"] < SIGNIFICANT
    low, high = text(row["low"]), text(row["high"])
    return Shown(text(row["mean"]), text(row["std"]), row["rank"] or 0, row["best"], low, high, text(half), differs)


def column_of(frame: pl.DataFrame, metric: str, posthoc: str) -> pl.DataFrame:
    """Rows of one column of a table."""
    return frame.filter(pl.col("metric") == metric, pl.col("posthoc") == posthoc)


def is_compared(summary: pl.DataFrame) -> bool:
    """Whether there are intervals to show."""
    return bool(summary["low"].count())
