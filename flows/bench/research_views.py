"""What a study of `csm bench research` found, for a terminal and as a section of docs/research.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from flows.bench.studies import Study

METRICS = {"accuracy": "accuracy %", "ece": "ECE %", "nll": "NLL x100", "brier": "Brier x100"}
COMPARED = {"nll": "NLL less reference", "brier": "Brier less reference"}
HEADS = {"val": "validation (decides)", "test": "test (shown only)"}

Row = Mapping[str, Any]


def tables(name: str, study: Study, rows: Sequence[Row]) -> list[Table]:
    """A table for each data set of the study ``name``: the methods on validation, then on test; x100."""
    return [_table(name, study, [row for row in rows if row["dataset"] == dataset]) for dataset in _datasets(rows)]


def _table(name: str, study: Study, rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"{name} on {rows[0]['dataset']}, {rows[0]['seeds']} seeds: {study.question}"
    table.add_column("split")
    table.add_column("method", no_wrap=True)
    for heading in [*METRICS.values(), *COMPARED.values(), *(["TV %"] if _knows_truth(rows) else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for split, head in HEADS.items():
        if split == "test":
            table.add_section()
        for row in rows:
            table.add_row(head if row is rows[0] else "", row["method"], *_cells(row, split, _knows_truth(rows)))
    return table


def markdown(name: str, study: Study, rows: Sequence[Row]) -> str:
    """The study as a section of Markdown, its tables and what the figures say by themselves."""
    lines = [f"## {name}", "", f"**Question.** {study.question}", "", f"**Hope.** {study.hope}", ""]
    lines += [f"    csm bench research {name}", ""]
    for dataset in _datasets(rows):
        of = [row for row in rows if row["dataset"] == dataset]
        heads = ["split", "method", *METRICS.values(), *COMPARED.values(), *(["TV %"] if _knows_truth(of) else [])]
        lines += [f"### {dataset}, {of[0]['seeds']} seeds", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for split, head in HEADS.items():
            lines += [f"| {' | '.join([head, row['method'], *_cells(row, split, _knows_truth(of))])} |" for row in of]
        lines += ["", verdict(of), ""]
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Which method has the least NLL on validation, and how sure that is against the reference; the same method on test."""
    reference = next(row for row in rows if row["method"] == row["reference"])
    best = min(rows, key=lambda row: row["val_nll"])
    if best is reference:
        return f"On validation no method has a lower NLL than the reference, `{reference['method']}`."
    sides = [f"{split}: {_ends(best[f'{split}_nll_minus'])}" for split in HEADS]
    sure = "its interval excludes 0" if best["val_nll_minus"][2] < 0 else "its interval holds 0: no difference is shown"
    return (
        f"Least NLL on validation: `{best['method']}`; x100, less the reference `{reference['method']}`, {'; '.join(sides)} "
        f"(on validation {sure})."
    )


def _cells(row: Row, split: str, truth: bool) -> list[str]:
    cells = [f"{100 * row[f'{split}_{metric}']:.1f}" for metric in METRICS]
    cells += [_ends(row[f"{split}_{metric}_minus"]) for metric in COMPARED]
    return [*cells, f"{100 * row['test_tv']:.1f}" if split == "test" else ""] if truth else cells


def _ends(minus: Sequence[float] | None) -> str:
    """Difference and interval, x100."""
    return "" if minus is None else f"{100 * minus[0]:+.1f} ({100 * minus[1]:+.1f} to {100 * minus[2]:+.1f})"


def _datasets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in rows))


def _knows_truth(rows: Sequence[Row]) -> bool:
    return any(row["test_tv"] is not None for row in rows)
