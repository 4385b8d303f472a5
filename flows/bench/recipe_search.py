"""The search of `csm bench recipe`: as many trials for each method, of which the one of least NLL on validation is taken."""

import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.training import TrainingError
from csm import storage
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.metrics import evaluate
from csm.runs import RunSpec
from csm.search.space import SearchSpace
from flows.artifacts import open_workspace
from flows.bench.recipe_plan import EPOCHS, RecipePlan, base_settings, settings, with_methods
from flows.config import Config, plain
from flows.evaluate import split_logits
from flows.progress import say
from flows.reuse import refuse_replacing, run_stages
from flows.run import STAGES, terminable, verb_stages
from flows.stages import Context
from flows.tracking_address import OWN, Address
from flows.train import run_specs
from flows.training import fit_runs

FIRST_SEED = 2000  # of trials: neither those that are reported, 0, 1, ..., nor those of the teacher, 1000, 1001, ...
FOLDER = "search"


@dataclass(frozen=True)
class Trial:
    """Settings that were tried for a method (a row of ``search.json``).

    Attributes:
        method, number: which; 0 are the settings as they stand.
        times: as many times the epochs of the trial ``number``, which was the best of its method.
        values: key of the method's settings -> what it was.
        nll: on the validation split at temperature 1, mean over the trial's classifiers, nats; None: it was not needed, or failed.
        seconds: of training, by the worker's clock, all classifiers together.
        error: why it failed.
        chosen: whether it is the best of its method.
    """

    method: str
    number: int
    values: dict[str, Any]
    nll: float | None = None
    seconds: float = 0.0
    error: str = ""
    chosen: bool = False
    times: int = 1

    @property
    def name(self) -> str:
        return f"{self.method}.t{self.number}" + (f"x{self.times}" if self.times > 1 else "")


def search(
    config: Config,
    plan: RecipePlan,
    names: Sequence[str],
    trials: int,
    doublings: int,
    seeds: int,
    root: Path,
    address: str = "local",
    command: str = "",
    tracking: Address = OWN,
) -> list[Trial]:
    """Make the images and labels of ``config`` in workspace ``root`` and try settings for each of ``names`` that is searched.

    The best trial of each method is then tried with twice its epochs, and where that is better twice that, ``doublings`` times at most.

    The trials are trained like any method, below ``root/search``, with seeds of their own; what is finished is not trained again. Their
    predictions on the test split are not read. ``root/search.json`` gets all of them.

    Args:
        config: of the final training, with ``names`` as methods.
        trials: of each method, before its epochs are doubled; 1: nothing is tried.
        seeds: of each trial.

    Raises:
        InputError: every trial of a method failed, or whatever the pipeline refuses.
    """
    found = [trial for name in names if not plan.methods[name].like for trial in draw(config, plan, name, trials)]
    with open_workspace(root) as opened, terminable():
        stages = verb_stages("run", config)
        before = stages[: stages.index("train")]
        with Context(config, opened, STAGES, address, command, tracking=tracking) as context:
            refuse_replacing(context, before)
            run_stages(context, before)
            found = choose(_try(context, found, seeds) if trials > 1 else found)
            for doubling in range(doublings if trials > 1 else 0):
                longer = [double(config, trial) for trial in found if trial.chosen and trial.times == 2**doubling]
                if longer:
                    say(f"recipe: twice the epochs of {', '.join(trial.name for trial in longer)}")
                    found = choose([*found, *_try(context, longer, seeds)])
    found.sort(key=lambda trial: names.index(trial.method))
    storage.write_json(root / "search.json", [asdict(trial) for trial in found])
    return found


def draw(config: Config, plan: RecipePlan, name: str, number: int) -> list[Trial]:
    """``number`` different trials of the method ``name``, fewer if there are no more: as it stands, then at random from its space.

    What is drawn depends on the name and the space alone, and fewer trials are the first of more.
    """
    space, found, seen = plan.space(name), [], set()
    for values in ({}, *_shuffled(space, name)):
        made = settings(config.train.methods[name], values, f"methods.{name}.space", config.train.optimizer)
        whole = {**made, "optimizer": {**plain(asdict(config.train.optimizer)), **made["optimizer"]}}
        identity = json.dumps(json.loads(json.dumps(whole), parse_int=float), sort_keys=True)  # 3 is 3.0
        if identity not in seen:
            seen.add(identity)
            found.append(Trial(name, len(found), values))
        if len(found) == number:
            break
    return found


def double(config: Config, trial: Trial) -> Trial:
    """``trial`` with twice its epochs, as times those of ``config`` where that is a whole number."""
    of = settings(config.train.methods[trial.method], trial.values, trial.name, config.train.optimizer)["optimizer"]
    epochs, unit = 2 * of.get("epochs", config.train.optimizer.epochs), config.train.optimizer.epochs
    values = {**trial.values, EPOCHS: epochs if epochs % unit else f"{epochs // unit}x"}
    return Trial(trial.method, trial.number, values, times=2 * trial.times)


def _shuffled(space: SearchSpace, name: str) -> list[dict[str, Any]]:
    assert space.size is not None  # `read_plan` looked
    order = list(range(space.size))
    random.Random(name).shuffle(order)
    return [space.at(index) for index in order] if space.entries else []


def trial_config(config: Config, trials: Sequence[Trial]) -> Config:
    """``config`` with ``trials`` as its methods."""
    known, optimizer = config.train.methods, config.train.optimizer
    methods = {
        trial.name: settings(known[trial.method], trial.values, f"methods.{trial.method}.space", optimizer) for trial in trials
    }
    return with_methods(config, methods, {"train.compare": [trial.name for trial in trials]})


def check_trials(config: Config, trials: Sequence[Trial]) -> None:
    """``InputError``, which names the method's place in the plan, if ``trials`` cannot be settings of methods of ``config``."""
    try:
        trial_config(config, trials)
    except InputError as error:
        place = re.sub(r"train\.methods\.(\S+?)\.t\d+\.", r"methods.\1.space, or common: ", str(error), count=1)
        place = re.sub(r"train\.methods\.\S+?\.t\d+\.", "", place)
        raise InputError(f"the plan: {place}") from None


def trial_specs(context: Context, seeds: int) -> list[RunSpec]:
    """The trainings of the trials that the configuration of ``context`` compares."""
    folder = context.workspace.root.absolute() / FOLDER
    return [replace(spec, directory=folder / spec.run) for spec in run_specs(context, range(FIRST_SEED, FIRST_SEED + seeds))]


def _try(context: Context, trials: Sequence[Trial], seeds: int) -> list[Trial]:
    """``trials``, trained with ``seeds`` and measured."""
    context.tracker  # noqa: B018  opens the parent run, to which the trials belong
    inner = replace(context, config=trial_config(context.config, trials), key=context.parent_key)
    specs = trial_specs(inner, seeds)
    errors = _train(inner, specs)
    context._connected = inner._connected
    measured = _measure(specs, errors, RealDataset.load_info(context.workspace.root).n_classes)
    return [replace(trial, **measured[trial.name]) for trial in trials]


def _train(context: Context, specs: Sequence[RunSpec]) -> dict[str, str]:
    """Train them; run -> error of those that failed."""
    try:
        fit_runs(context, specs, "search", "trial")
    except TrainingError as error:
        say(f"  search: {error}")
        return error.errors
    return {}


def _measure(specs: Sequence[RunSpec], errors: Mapping[str, str], n_classes: int) -> dict[str, dict[str, Any]]:
    """What ``Trial`` says of each trial once it is trained."""
    runs = defaultdict(list)
    for spec in specs:
        runs[spec.method].append(spec)
    measured: dict[str, dict[str, Any]] = {}
    for name, of in runs.items():
        error = next((errors[spec.run] for spec in of if spec.run in errors), "")
        if error:
            measured[name] = {"error": error}
            continue
        nlls = [evaluate(*split_logits(spec, "val", n_classes), metrics=["nll"])["nll"] for spec in of]
        seconds = sum(storage.read_json(spec.directory / "run.json")["seconds"] for spec in of)
        measured[name] = {"nll": sum(nlls) / len(nlls), "seconds": round(seconds, 3)}
    return measured


def choose(trials: Sequence[Trial]) -> list[Trial]:
    """``trials`` with the best of each method marked: of least NLL, of equal ones the first; where nothing was tried, the first.

    Raises:
        InputError: every trial of a method failed.
    """
    best: dict[str, Trial] = {}
    for trial in trials:
        if not trial.error and (trial.method not in best or _nll(trial) < _nll(best[trial.method])):
            best[trial.method] = trial
    lost = next((trial for trial in trials if trial.method not in best), None)
    if lost:
        raise InputError(f"methods.{lost.method}: every trial failed ({lost.error}); change its space in the plan")
    return [replace(trial, chosen=trial is best[trial.method]) for trial in trials]


def _nll(trial: Trial) -> float:
    return math.inf if trial.nll is None or math.isnan(trial.nll) else trial.nll


def chosen_config(config: Config, plan: RecipePlan, names: Sequence[str], trials: Sequence[Trial]) -> Config:
    """``config`` with the methods ``names`` as the search left them, and those like them."""
    values = {trial.method: trial.values for trial in trials if trial.chosen}
    methods = {name: base_settings(plan, config, name, values) for name in names}
    return with_methods(config, methods, {"train.compare": list(names)})
