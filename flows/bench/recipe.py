"""bench recipe: the recipe against the published method, every baseline and every ablation, each with its best settings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csm import storage
from csm.errors import InputError
from csm.parameters import check_name
from flows.artifacts import Workspace
from flows.bench.calibration import calibrate
from flows.bench.recipe_page import markdown
from flows.bench.recipe_plan import KNOWN_TRUTH, RecipePlan, Size, base_settings, check_datasets, image_kinds, with_methods
from flows.bench.recipe_reach import reach
from flows.bench.recipe_rows import rows
from flows.bench.recipe_search import check_trials, chosen_config, draw, search
from flows.config import Config, load_config
from flows.progress import say
from flows.tracking_address import OWN, Address


class Proof(NamedTuple):
    """What the comparison found: rows of the data sets that were asked for, and run -> error of trainings that failed."""

    rows: list[dict[str, Any]]
    failed: dict[str, str]


class Work(NamedTuple):
    """A data set of the comparison: its name, its configuration with the methods as they stand, and these methods."""

    name: str
    config: Config
    methods: tuple[str, ...]


def recipe(
    root: Path,
    plan: RecipePlan,
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int | None = None,
    trials: int | None = None,
    doublings: int | None = None,
    quick: bool = False,
    overrides: Sequence[str] = (),
    address: str = "local",
    command: str = "",
    tracking: Address = OWN,
) -> Proof:
    """Search every method's settings with the same budget and compare the methods with what was chosen, data set by data set.

    Each data set is a workspace below ``root``: what is finished there is not done again, and a changed plan trains only what changed.
    After each, ``root/recipe.json`` has its rows (beside those of other data sets from earlier), ``root/reach.json`` the targets, and
    ``root/recipe.md`` both as a page.

    Args:
        datasets, methods, seeds, trials, doublings: other ones than the plan's; methods that the given ones need come along.
        quick: the small size of the plan, below ``root/quick``.
        overrides: KEY=VALUE for the configuration of every data set, over those of the plan.

    Raises:
        InputError: a name is unknown, the plan does not fit the configurations, or whatever the pipeline refuses.
    """
    size = plan.quick if quick else plan.full
    if size is None:
        raise InputError("--quick: the plan has no size 'quick': give it one, or leave the option out")
    root = root / "quick" if quick else root
    trials, seeds = trials or size.trials, seeds or size.seeds
    doublings = size.doublings if doublings is None else doublings
    names = _datasets(datasets, "--datasets") if datasets else _datasets(size.datasets, "the plan's datasets")
    works = [_work(plan, size, name, methods, seeds, overrides) for name in names]
    drawn = [[trial for name in _searched(work, plan) for trial in draw(work.config, plan, name, trials)] for work in works]
    for work, tried in zip(works, drawn, strict=True):
        check_trials(work.config, tried)  # now, not after the images are made
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number, work in enumerate(works):
        folder = root / work.name
        left = ", ".join(each.name for each in works[number + 1 :]) or "none"
        where = f"recipe: data set {number + 1} of {len(works)}, {work.name}"
        searched, tried = _searched(work, plan), len(drawn[number]) if trials > 1 else 0
        say(f"{where}: phase 1 of 2, images and {tried} trials of {len(searched)} methods; data sets after it: {left}")
        options = (folder, address, command, tracking)
        chosen = search(work.config, plan, work.methods, trials, doublings, size.trial_seeds, *options)
        say(f"{where}: phase 2 of 2, {len(work.methods)} methods x {seeds} seeds; data sets after it: {left}")
        outcome = calibrate(chosen_config(work.config, plan, work.methods, chosen), *options)
        failed |= {f"{work.name}: {run}": error for run, error in outcome.failed.items()}
        if outcome.config is not None:
            found += rows(outcome.config, Workspace(folder), work.name, plan, chosen)
        _write(root, found, work.name)
    return Proof(found, failed)


def _searched(work: Work, plan: RecipePlan) -> list[str]:
    """Methods that have a search of their own."""
    return [name for name in work.methods if not plan.methods[name].like]


def _datasets(names: Sequence[str], where: str) -> list[str]:
    check_datasets(names, where)
    stems = [Path(name).stem for name in names]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise InputError(f"{where}: {twice} is named more than once")
    return list(names)


def _work(plan: RecipePlan, size: Size, dataset: str, asked: Sequence[str], seeds: int, overrides: Sequence[str]) -> Work:
    """What is done on ``dataset``: images of all kinds that methods of this ``size`` train on, and of the methods those ``asked`` for."""
    laid = [f"{key}={json.dumps(value)}" for key, value in (plan.settings | size.settings).items()]
    config = load_config(dataset, [*laid, *overrides, f"train.seeds={seeds}", "train.loss=null"])
    for name in asked:
        check_name("--methods", name, plan.methods)
    possible = [name for name in plan.methods if plan.methods[name].kind != "ceiling" or config.data["source"] == KNOWN_TRUTH]
    everything = [name for name in plan.with_needed(size.methods or possible) if name in possible]
    chosen = tuple(name for name in plan.with_needed(asked) if name in possible) if asked else tuple(everything)
    methods = {name: base_settings(plan, config, name, {}) for name in dict.fromkeys((*everything, *chosen))}
    # Images for all of them, so that a workspace in which some methods are compared is good for the others.
    changes = {"plan.kinds": image_kinds(methods, [plan.space(name) for name in methods]), "train.compare": list(chosen)}
    return Work(Path(dataset).stem, with_methods(config, methods, changes), chosen)


def _write(root: Path, found: Sequence[dict[str, Any]], dataset: str) -> None:
    """Bring the rows of ``dataset`` into the file, beside those of others."""
    path = root / "recipe.json"
    before = storage.read_json(path) if path.is_file() else []
    here = {row["dataset"] for row in found} | {dataset}
    kept = [row for row in before if row["dataset"] not in here]
    everything = [*kept, *found]
    targets = reach(everything)
    storage.write_json(path, everything)
    storage.write_json(root / "reach.json", [each._asdict() for each in targets])
    storage.write_text(root / "recipe.md", markdown(everything, targets))
