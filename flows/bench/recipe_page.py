"""What `csm bench recipe` found as a page of Markdown: for each data set the methods, what was chosen for them, and the targets."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.bench.recipe_reach import Reach

HEADS = {
    "accuracy": "accuracy %",
    "ece": "ECE %",
    "nll": "NLL x100",
    "brier": "Brier x100",
    "tv": "TV %",
    "ece_t": "ECE % at T",
    "nll_t": "NLL x100 at T",
    "brier_t": "Brier x100 at T",
    "tv_t": "TV % at T",
}

Row = Mapping[str, Any]


def markdown(rows: Sequence[Row], targets: Sequence[Reach]) -> str:
    """A section for each data set of ``rows``, see ``recipe_rows.rows``: its methods, least NLL first in each kind, and ``targets``."""
    lines = ["# csm bench recipe", ""]
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of = [row for row in rows if row["dataset"] == dataset]
        lines += [f"## {dataset}", "", _about(of), "", *_methods(of), ""]
        if chosen := _chosen(of):
            lines += [
                "Settings that the search chose or the plan gives, where the method has others as it stands:",
                "",
                *chosen,
                "",
            ]
        if here := [each for each in targets if each.dataset == dataset]:
            lines += [f"{sum(each.reached for each in here)} of {len(here)} targets reached.", "", *_targets(here), ""]
    return "\n".join(lines)


def _about(rows: Sequence[Row]) -> str:
    seeds, bayes = rows[0]["seeds"], rows[0]["bayes_accuracy"]
    said = [f"Test split, {seeds} seeds: mean ± standard deviation over them." if seeds > 1 else "Test split, one seed."]
    made = [max(row[name] for row in rows) for name in ("generation_seconds", "annotation_seconds")]  # those of the workspace
    if any(made):
        said.append(f"Images took {made[0]:,.0f} s and their labels {made[1]:,.0f} s by the clock, once for all methods.")
    if bayes is not None:
        said.append(f"The best classifier that there could be has an accuracy of {100 * bayes:.1f} %.")
    return " ".join(said)


def _methods(rows: Sequence[Row]) -> list[str]:
    shown = [figure for figure in HEADS if any(row[figure] is not None for row in rows)]
    heads = ["method", "kind", *(HEADS[figure] for figure in shown), "device-seconds"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    ordered = sorted(rows, key=lambda row: (kinds.index(row["kind"]), row["nll"]))
    cells = [
        [f"`{row['method']}`", row["kind"], *(_cell(row, figure) for figure in shown), f"{row['device_seconds']:.1f}"]
        for row in ordered
    ]
    return _table(heads, cells)


def _cell(row: Row, figure: str) -> str:
    spread = row.get(f"{figure}_sd")
    return f"{100 * row[figure]:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def _chosen(rows: Sequence[Row]) -> list[str]:
    return [
        f"- `{row['method']}`: " + ", ".join(f"`{key}` {_value(value)}" for key, value in row["settings"].items())
        for row in rows
        if row["settings"]
    ]


def _value(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _targets(targets: Sequence[Reach]) -> list[str]:
    heads = ["target", "against", "figure", "limit", "reached", "x100: recipe against it (difference, paired 95 % interval)"]
    cells = [
        [
            each.target,
            f"`{each.against}`",
            f"{each.figure:.3f}",
            f"{each.sense} {each.limit:.3g}",
            "yes" if each.reached else "**no**",
            each.detail,
        ]
        for each in targets
    ]
    return _table(heads, cells)


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(line)} |" for line in cells)]
