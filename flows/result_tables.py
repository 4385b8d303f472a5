"""The results as tables for a terminal."""

from collections.abc import Mapping, Sequence

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from flows.shift_summary import ShiftTable
from flows.summary import COLUMNS, NONE, SIGNIFICANT, TEMPERATURE, Method, baseline_of, is_compared, shown

POSTHOC_COLUMNS = tuple(column for column in COLUMNS if column.metric in ("ece", "nll"))


def terminal_table(
    summary: pl.DataFrame, methods: Sequence[Method], cost: Mapping[str, float] | None = None, device: str = "core s"
) -> Table:
    """Return the results as a table for terminals of 80 columns and more.

    The upper half is without temperature, the lower half with the fitted one; the best of a column in each
    half is bold and marked ``*``, what differs significantly from the baseline ``†``. ``cost`` is in ``device`` (core s, GPU s).
    """
    table = _table()
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("T", justify="right", no_wrap=True)
    for column in COLUMNS:
        table.add_column(f"{column.label} {column.arrow}\n{column.unit}", justify="right", no_wrap=True)
    if cost:
        table.add_column(f"cost\n{device}", justify="right", no_wrap=True)
    for posthoc in (NONE, TEMPERATURE):
        if posthoc == TEMPERATURE:
            table.add_section()
        for method in methods:
            fit = shown(summary, method.name, "temperature", posthoc)
            temperature = Text((fit.mean if fit else "-") if posthoc == TEMPERATURE else "1")
            values = [_cell(summary, method.name, column.metric, posthoc) for column in COLUMNS]
            spent = [Text(_seconds(cost.get(method.name)) if posthoc == NONE else "")] if cost else []
            table.add_row(Text(method.name, style="cyan" if method.is_ours else ""), temperature, *values, *spent)
    table.caption = Text("\n".join(_legend(summary, methods, bool(cost))))
    return table


def posthoc_table(summary: pl.DataFrame, methods: Sequence[Method]) -> Table | None:
    """ECE and NLL after every post-hoc method, the lowest of each method marked; None if there is none beside temperature."""
    names = summary["posthoc"].unique(maintain_order=True).to_list()
    if not set(names) - {NONE, TEMPERATURE}:
        return None
    table = _table()
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("")
    for name in names:
        table.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for method in methods:
        for column in POSTHOC_COLUMNS:
            cells = lowest(summary, method.name, column.metric, names)
            texts = [
                Text("- " if c is None else c[0] + ("*" if c[1] else " "), style="bold" if c and c[1] else "") for c in cells
            ]
            table.add_row(Text(method.name if column is POSTHOC_COLUMNS[0] else ""), f"{column.label} {column.unit}", *texts)
    table.caption = Text("after post-hoc methods, fitted on validation; mean over seeds; * lowest of its line")
    return table


def lowest(summary: pl.DataFrame, method: str, metric: str, posthocs: Sequence[str]) -> list[tuple[str, bool] | None]:
    """The metric of one method after each post-hoc method, and whether it is the lowest of them, by what is shown."""
    figures = [shown(summary, method, metric, posthoc) for posthoc in posthocs]
    values = [float(figure.mean) for figure in figures if figure is not None]
    return [None if figure is None else (figure.mean, float(figure.mean) == min(values)) for figure in figures]


def shift_table(shift: ShiftTable) -> Table:
    """A shift set as a table for a terminal: over corruptions, severity by severity."""
    after = "as trained" if shift.posthoc == NONE else "with the fitted temperature"
    table = _table()
    table.title, table.title_justify, table.title_style = Text(f"{shift.shift}, {after}"), "left", "bold"
    table.add_column("method", overflow="fold", min_width=8)
    for group in shift.groups:
        for index, column in enumerate(shift.columns):
            head = f"{group.label} {group.arrow} {group.unit}" if len(shift.columns) == 1 else (group.label if index == 0 else "")
            table.add_column(f"{head}\n{column}", justify="right", no_wrap=True)
    for name, cells in shift.rows.items():
        texts = [Text("- " if c is None else c[0] + ("*" if c[1] else " "), style="bold" if c and c[1] else "") for c in cells]
        table.add_row(Text(name), *texts)
    if shift.corruptions:
        table.caption = Text(f"by severity; mean over seeds and {len(shift.corruptions)} corruptions; NLL ×100, else %; * best")
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")


def _cell(summary: pl.DataFrame, method: str, metric: str, posthoc: str) -> Text:
    figure = shown(summary, method, metric, posthoc)
    if figure is None:
        return Text("- ", style="dim")
    spread = figure.half if is_compared(summary) else figure.std
    text = f"{figure.mean}±{spread}" if spread else figure.mean
    marks = ("*" if figure.best else " ") + ("†" if figure.differs else " " if is_compared(summary) else "")
    return Text(text + marks, style="bold" if figure.best else "")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _legend(summary: pl.DataFrame, methods: Sequence[Method], cost: bool) -> list[str]:
    seeds = "seeds and test images" if summary["std"].count() else "test images; one seed"
    if is_compared(summary):
        lines = [f"±: half of the 95 % interval over {seeds}; * best; T = 1: no temperature scaling"]
        if summary["p_holm"].count():
            lines.append(
                f"† differs from {baseline_of(methods)}: p < {SIGNIFICANT:g}, paired bootstrap, Holm-corrected for all methods"
            )
    else:
        spread = "mean±standard deviation over seeds" if summary["std"].count() else "one seed"
        lines = [f"{spread}; * best; T = 1: no temperature scaling"]
    return [*lines, "cost: training one classifier, or all members of an ensemble; mean over seeds"] if cost else lines
