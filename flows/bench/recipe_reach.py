"""Whether the recipe reaches what it is to reach, target by target, from the rows of `csm bench recipe`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from flows.bench.recipe_plan import BASELINES

BELOW = 0.8  # NLL and Brier score over the best baseline's, at most
ECE_SHARE = 1 / 3  # ECE over cross-entropy's, at most
TV_BELOW = 0.85  # TV over the best baseline's, at most
WAY = 0.6  # from the TV of cross-entropy to that of the true posterior as annotator, at least
PLAIN = "cross-entropy"
LABELS = {
    "accuracy": "accuracy",
    "ece": "ECE",
    "nll": "NLL",
    "brier": "Brier",
    "nll_t": "NLL at T",
    "brier_t": "Brier at T",
    "tv": "TV",
}

Row = Mapping[str, Any]


class Reach(NamedTuple):
    """A target on a data set.

    Attributes:
        dataset, target: which.
        figure: what it came to, ``limit`` what it must be at most (``sense`` "<=" and "<") or at least (">=").
        against: the method that it is compared with.
        reached: whether it is so.
        detail: the numbers behind it.
    """

    dataset: str
    target: str
    figure: float
    sense: str
    limit: float
    against: str
    reached: bool
    detail: str


def reach(rows: Sequence[Row]) -> list[Reach]:
    """The targets of every data set in ``rows``, as far as the methods that they speak of are there.

    The best of the baselines, losses and pixel mixings, is another one for each figure: that of the best mean.
    """
    found: list[Reach] = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of = [row for row in rows if row["dataset"] == dataset]
        recipe = next((row for row in of if row["kind"] == "recipe"), None)
        if recipe is not None:
            found += _targets(recipe, of)
    return found


def _targets(recipe: Row, rows: Sequence[Row]) -> Iterable[Reach]:
    baselines = [row for row in rows if row["kind"] in BASELINES]
    ablations = [row for row in rows if row["kind"] == "ablation"]
    plain = next((row for row in rows if row["method"] == PLAIN), None)
    ceiling = next((row for row in rows if row["kind"] == "ceiling"), None)
    if baselines:
        for figure in ("nll", "brier", "nll_t", "brier_t"):
            yield _ratio(
                recipe, _best(baselines, figure), figure, BELOW, f"{LABELS[figure]} at most {BELOW:g} of the best baseline's"
            )
    for figure in ("nll", "brier", "nll_t", "brier_t") if ablations else ():
        yield _below_all(recipe, ablations, figure)
    if baselines:
        best = _best(baselines, "accuracy", max)
        gap = recipe["accuracy"] - best["accuracy"]
        detail = f"{_percent(recipe, 'accuracy')} against {_percent(best, 'accuracy')}{_interval(best, 'accuracy')}"
        yield Reach(recipe["dataset"], "accuracy at least the best baseline's", gap, ">=", 0.0, best["method"], gap >= 0, detail)
        yield _ratio(recipe, _best(baselines, "ece"), "ece", 1.0, "ECE at most the best baseline's")
    if plain:
        yield _ratio(recipe, plain, "ece", ECE_SHARE, "ECE at most a third of cross-entropy's")
    if recipe["tv"] is not None and baselines:
        yield _ratio(recipe, _best(baselines, "tv"), "tv", TV_BELOW, f"TV at most {TV_BELOW:g} of the best baseline's")
    if recipe["tv"] is not None and plain and ceiling:
        whole = plain["tv"] - ceiling["tv"]
        share = (plain["tv"] - recipe["tv"]) / whole if whole > 0 else float("nan")
        detail = f"TV {_percent(plain, 'tv')} -> {_percent(recipe, 'tv')} -> {_percent(ceiling, 'tv')}"
        target = f"{100 * WAY:.0f} % of the way from cross-entropy to the true posterior as annotator"
        yield Reach(recipe["dataset"], target, share, ">=", WAY, ceiling["method"], share >= WAY, detail)


def _best(rows: Sequence[Row], figure: str, choose: Callable[..., Row] = min) -> Row:
    return choose(rows, key=lambda row: row[figure])


def _ratio(recipe: Row, other: Row, figure: str, limit: float, target: str) -> Reach:
    ratio = recipe[figure] / other[figure] if other[figure] > 0 else float("inf")
    detail = f"{_percent(recipe, figure)} against {_percent(other, figure)}{_interval(other, figure)}"
    if figure == "ece" and "ece_chance" in recipe:
        detail += f"; chance alone gives {_percent(recipe, 'ece_chance')}"
    return Reach(recipe["dataset"], target, ratio, "<=", limit, other["method"], ratio <= limit, detail)


def _below_all(recipe: Row, ablations: Sequence[Row], figure: str) -> Reach:
    """The upper end of the interval of the difference to the ablation where it is highest must lie below 0."""
    worst = _best(ablations, figure, lambda rows, key: max(rows, key=lambda row: row["recipe_minus"][figure][2]))
    failing = [row["method"] for row in ablations if row["recipe_minus"][figure][2] >= 0]
    high = worst["recipe_minus"][figure][2]
    detail = f"{_percent(recipe, figure)} against {_percent(worst, figure)}{_interval(worst, figure)}"
    more = f"; not below {', '.join(failing)}" if len(failing) > 1 else ""
    target = f"{LABELS[figure]} below every ablation's, interval without 0"
    return Reach(recipe["dataset"], target, high, "<", 0.0, worst["method"], not failing, detail + more)


def _percent(row: Row, figure: str) -> str:
    return f"{100 * row[figure]:.1f}"


def _interval(row: Row, figure: str) -> str:
    """The paired interval of the recipe less this row, x100; "" where there is none."""
    ends = (row["recipe_minus"] or {}).get(figure)
    return f" ({100 * ends[0]:+.1f}, {100 * ends[1]:+.1f} to {100 * ends[2]:+.1f})" if ends else ""


def reach_table(found: Sequence[Reach]) -> Table:
    """The targets for a terminal, a section for each data set."""
    count = sum(each.reached for each in found)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"{count} of {len(found)} targets reached; x100: mean against mean (difference, its paired 95 % interval)"
    for heading in ("data set", "target", "against", "figure", "limit", "reached", "x100"):
        table.add_column(
            heading, justify="right" if heading in ("figure", "limit") else "left", no_wrap=heading not in ("target", "x100")
        )
    for index, each in enumerate(found):
        first = index == 0 or found[index - 1].dataset != each.dataset
        if first and index:
            table.add_section()
        cells = (f"{each.figure:.3f}", f"{each.sense} {each.limit:.3g}", "yes" if each.reached else "no")
        table.add_row(each.dataset if first else "", each.target, each.against, *cells, each.detail)
    return table
