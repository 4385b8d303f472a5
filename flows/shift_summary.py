"""What a run's shift metrics say: means over seeds and corruptions, the best of each column."""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl

from flows.summary import NONE, TEMPERATURE, Column, Method

CORRUPTED = (
    Column("accuracy", "Accuracy", "%", "higher"),
    Column("ece", "ECE", "%", "lower"),
    Column("nll", "NLL", "×100", "lower"),
)
OUTSIDE = (Column("auroc_msp", "AUROC", "%", "higher"), Column("fpr95_msp", "FPR95", "%", "lower"))


class ShiftTable(NamedTuple):
    """One shift set after one post-hoc method; cells are (text, best) and None where nothing was measured.

    ``groups`` are the metrics, each over ``columns``: the severities, or "" out of distribution.
    """

    shift: str
    posthoc: str
    corruptions: tuple[str, ...]
    groups: tuple[Column, ...]
    columns: tuple[str, ...]
    rows: dict[str, list[tuple[str, bool] | None]]


def shift_tables(metrics: pl.DataFrame, methods: Sequence[Method]) -> list[ShiftTable]:
    """A table for each shift set, as trained and with the fitted temperature: means over corruptions and seeds.

    Args:
        metrics: columns of ``csm.tables.SHIFT_METRICS``; values as fractions.
        methods: those to show, in this order.
    """
    names = [method.name for method in methods]
    metrics = metrics.filter(pl.col("method").is_in(names))
    found = []
    for (shift,), of_shift in metrics.group_by(["shift"], maintain_order=True):
        is_outside = of_shift["corruption"].null_count() == len(of_shift)
        corruptions = tuple(of_shift["corruption"].drop_nulls().unique().sort())
        severities = of_shift["severity"].unique().sort().to_list()
        for posthoc in (NONE, TEMPERATURE):
            rows = of_shift.filter(posthoc=posthoc)
            groups = OUTSIDE if is_outside else CORRUPTED if posthoc == NONE else CORRUPTED[1:]  # the accuracy stays as it is
            columns = [
                _column(rows.filter(pl.col("severity").eq_missing(severity), metric=group.metric), group, names)
                for group in groups
                for severity in severities
            ]
            if any(any(column) for column in columns):
                heads = tuple("" if s is None else str(s) for s in severities)
                cells = {name: [column[i] for column in columns] for i, name in enumerate(names)}
                found.append(ShiftTable(str(shift), posthoc, corruptions, groups, heads, cells))
    return found


def _column(rows: pl.DataFrame, column: Column, names: Sequence[str]) -> list[tuple[str, bool] | None]:
    """Cells of one column, the best by what is shown marked if there are at least two."""
    finite = pl.col("value").is_finite().fill_null(False).all()
    means = dict(rows.group_by("method").agg(pl.when(finite).then(pl.col("value").mean())).iter_rows())
    texts = [None if means.get(name) is None else f"{100 * means[name]:.1f}" for name in names]
    values = [float(text) for text in texts if text is not None]
    best = None if len(values) < 2 else (max(values) if column.better == "higher" else min(values))
    return [None if text is None else (text, float(text) == best) for text in texts]
