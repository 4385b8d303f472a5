"""A comparison as tables for a terminal and as a page."""

from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from csm.errors import InputError
from flows.compare import BINS, NAMES, Compared
from flows.reliability import diagram, is_drawable
from flows.summary import COLUMNS, NONE, SIGNIFICANT, TEMPERATURE

SHORT = ("ece", "mce", "ks", "oe", "ue", "ce", "aurc")  # words of metrics' names that are abbreviations
HIGHER = ("accuracy", "brier_resolution")  # what is better when it is more; the other metrics when they are less
SECTIONS = {NONE: "as trained", TEMPERATURE: "with the fitted temperature"}


class Cell(NamedTuple):
    """A metric of one run, times 100, or its difference to the baseline's: the value, its interval, the p-value; "" where there is none.

    ``verdict`` is "better" or "worse" if p is below ``SIGNIFICANT``.
    """

    value: str
    interval: str = ""
    p: str = ""
    verdict: str = ""


def value_cell(compared: Compared, run: str, metric: str, posthoc: str) -> Cell:
    """What was measured."""
    row = compared.row(run, metric, posthoc)
    return Cell(f"{100 * row['mean']:.2f}", _interval(row["low"], row["high"], ".2f"))


def difference_cell(compared: Compared, run: str, metric: str, posthoc: str) -> Cell:
    """What was measured, minus the baseline's."""
    row = compared.row(run, metric, posthoc)
    p = row["p"]
    verdict = ""
    if p is not None and p < SIGNIFICANT:
        verdict = "better" if (row["difference"] > 0) == (metric in HIGHER) else "worse"
    text = "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return Cell(
        f"{100 * row['difference']:+.2f}", _interval(row["difference_low"], row["difference_high"], "+.2f"), text, verdict
    )


def label(metric: str) -> str:
    """A metric's name for people, with an arrow to where it is better."""
    known = {column.metric: column.label for column in COLUMNS}
    words = " ".join(word.upper() if word in SHORT else word for word in metric.split("_"))
    text = known.get(metric, words[0].upper() + words[1:])
    return f"{text} {'↑' if metric in HIGHER else '↓'}"


def terminal_tables(compared: Compared) -> list[Table]:
    """What differs in configuration, and a table of metrics for each run against the baseline."""
    settings = _table("What differs in configuration")
    settings.add_column("setting", overflow="fold")
    for name in compared.names:
        settings.add_column(Text(name), overflow="fold")
    for key, values in compared.settings.items():
        settings.add_row(Text(key), *(Text("-" if value is None else value) for value in values))
    if not compared.settings:
        settings.add_row(Text("nothing"), *([""] * len(compared.names)))
    tables = [settings, *(_against(compared, name) for name in compared.names[1:])]
    tables[-1].caption = Text("\n".join(notes(compared)))
    return tables


def notes(compared: Compared) -> list[str]:
    """How to read the figures."""
    seeds = len(compared.seeds[0])
    over = f"{seeds} seeds and the images" if seeds > 1 else "the images"
    lines = [f"all times 100, with the 95 % interval over {over}, paired; † p < {SIGNIFICANT:g}"]
    if len(compared.trained) > 2:
        lines[0] += ", corrected (Holm) for as many as are compared"
    if seeds == 1:
        lines.append(
            "one training of each: the intervals are about these classifiers on other images, not about how they were trained"
        )
    if compared.split == "val":
        lines.append(
            "measured on validation, as a trial is among them that no sweep has chosen; temperatures were fitted there too"
        )
    if old := _with_old_labels(compared):
        lines.append(f"trained on soft labels that were made anew since: {', '.join(old)}; csm train trains on the new ones")
    temperatures = zip(compared.names, compared.temperatures, strict=True)
    return [*lines, "temperature: " + ", ".join(f"{name} {value:.2f}" for name, value in temperatures)]


def _with_old_labels(compared: Compared) -> list[str]:
    """Names of those whose labels are not what the workspace has now, with the seeds where it is not all of them."""
    names = []
    for each, seeds in zip(compared.trained, compared.seeds, strict=True):
        old = [str(seed) for seed in seeds if seed in each.old_labels]
        if old:
            names.append(each.name if len(old) == len(seeds) else f"{each.name} (seed {', '.join(old)})")
    return names


def page(compared: Compared) -> str:
    """The comparison as one HTML page that loads nothing from elsewhere; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pairs = zip(compared.trained, compared.reliability, strict=True)
    return environment.get_template("compare.html.j2").render(
        compared=compared,
        metrics=NAMES,
        sections=SECTIONS,
        label=label,
        value=value_cell,
        difference=difference_cell,
        notes=notes(compared),
        bins=BINS,
        diagrams=[(each, diagram(pair, BINS) if is_drawable(pair) else None) for each, pair in pairs],
    )


def write_page(compared: Compared, file: Path) -> None:
    """:func:`page` as ``file``; ``InputError`` if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(compared), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {file}: cannot be written ({error.strerror}); choose another file") from None


def _against(compared: Compared, name: str) -> Table:
    baseline, seeds = compared.names[0], len(compared.seeds[0])
    of = f"{compared.images:,} {'validation' if compared.split == 'val' else compared.split} images"
    table = _table(f"{name} against {baseline}: {of}, {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("metric", no_wrap=True)
    for head in (baseline, name, "difference", "p"):
        table.add_column(Text(head), justify="right", overflow="fold")
    for posthoc, words in SECTIONS.items():
        table.add_section()
        table.add_row(Text(words, style="italic"))
        for metric in NAMES:
            change = difference_cell(compared, name, metric, posthoc)
            cells: list[Any] = [_joined(value_cell(compared, run, metric, posthoc)) for run in (baseline, name)]
            style = {"better": "green", "worse": "red"}.get(change.verdict, "")
            mark = "†" if change.verdict else " "
            table.add_row(Text(label(metric)), *cells, Text(_joined(change), style=style), Text(change.p + mark))
    return table


def _table(title: str) -> Table:
    words = Text(f"\n{title}", style="bold")
    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=words, title_justify="left", caption_justify="left"
    )


def _joined(cell: Cell) -> str:
    return f"{cell.value} [{cell.interval}]" if cell.interval else cell.value


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{100 * low:{form}}, {100 * high:{form}}"
