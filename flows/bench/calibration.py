"""bench calibration: many methods x seeds on one data set, trained and measured alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from cluster.training import TrainingError
from csm import storage, tables
from csm.methods import Method
from csm.parameters import check_name
from flows.artifacts import Workspace
from flows.config import Config, load_config
from flows.progress import say
from flows.run import run_verb
from flows.summary import NONE, TEMPERATURE
from flows.tracking_address import OWN, Address

METRICS = ("accuracy", "ece", "aece", "nll", "brier")
AFTER = ("ece", "nll")

# --methods NAME; the baseline, cross-entropy, is a loss, and what mixing is compared with
GROUPS: dict[str, Callable[[str, Method], bool]] = {
    "all": lambda name, method: True,
    "losses": lambda name, method: method.mixing is None and method.mixed is None and method.members == 1,
    "mixing": lambda name, method: (
        ((method.mixing is not None or method.mixed is not None) and method.members == 1) or name == "cross-entropy"
    ),
}


class Outcome(NamedTuple):
    """What a benchmark found.

    Attributes:
        rows: one for each method and seed that was trained.
        failed: run -> error of those that were not; their methods have no rows.
        config: of the methods that have rows, for tables; None if there are none.
    """

    rows: list[dict[str, Any]]
    failed: dict[str, str]
    config: Config | None


def configure(config: str, overrides: Sequence[str] = (), methods: str | None = None, seeds: int | None = None) -> Config:
    """The configuration of a benchmark.

    Args:
        config, overrides: as for ``load_config``.
        methods: a name of ``GROUPS`` (of those whose images ``plan.kinds`` has), or names of methods with commas between; None: those
            that the configuration compares.
        seeds: of each method; None: as the configuration says.

    Raises:
        InputError: a name is unknown, or what ``load_config`` refuses.
    """
    settings = [*overrides, *([f"train.seeds={seeds}"] if seeds is not None else [])]
    if methods is None:
        return load_config(config, settings)
    base = load_config(config, settings)
    known = base.train.methods
    names = [name.strip() for name in methods.split(",")]
    if methods in GROUPS:
        planned = [name for name, method in known.items() if not method.mixed or {*method.mixed.kinds} <= {*base.plan.kinds}]
        names = [name for name in planned if GROUPS[methods](name, known[name])]
    for name in names:
        check_name("--methods", name, {**known, **GROUPS} if len(names) == 1 else known)
    return load_config(config, [*settings, "train.loss=null", f"train.compare=[{', '.join(dict.fromkeys(names))}]"])


def calibrate(config: Config, root: Path, address: str = "local", command: str = "", tracking: Address = OWN) -> Outcome:
    """Run the pipeline with every method and seed of ``config`` in workspace ``root``; what is done there is not done again.

    Methods of which a training fails are left out of the metrics, the comparison and the report, and tried again next time. MLflow has a
    run for each classifier, with what the rows say. The rows also go to ``root/calibration.json``:

    * method, seed.
    * accuracy, ece, aece, nll (nats), brier: on the test split, as trained; fractions.
    * temperature, ece_t, nll_t: the temperature fitted on validation and what it gives; null if ``evaluate.posthoc`` has none.
    * seconds: of training, by the worker's clock.

    Raises:
        InputError: whatever the pipeline refuses.
        TrainingError: a training failed that is not of a method, but of what methods need.
    """
    failed: dict[str, str] = {}
    try:
        run_verb("run", config, root, address, command, (), tracking)
    except TrainingError as error:
        lost = [
            name for name in config.train.chosen if any(_run(name, seed) in error.errors for seed in range(config.train.seeds))
        ]
        if not lost:
            raise
        failed = error.errors
        left = tuple(name for name in config.train.chosen if name not in lost)
        if not left:
            return Outcome([], failed, None)
        say(f"going on without {', '.join(lost)}")
        config = replace(config, train=replace(config.train, compare=left))
        run_verb("run", config, root, address, command, (), tracking)
    rows = _rows(config, Workspace(root))
    storage.write_json(root / "calibration.json", rows)
    return Outcome(rows, failed, config)


def _rows(config: Config, workspace: Workspace) -> list[dict[str, Any]]:
    metrics = tables.read(workspace.metrics, tables.METRICS).filter(pl.col("split").cast(pl.String) == "test")
    found: dict[tuple[str, str], dict[str, float]] = {}
    temperatures: dict[str, float] = {}
    for row in metrics.iter_rows(named=True):
        found.setdefault((row["run"], row["posthoc"]), {})[row["metric"]] = row["value"]
        if row["posthoc"] == TEMPERATURE:
            temperatures[row["run"]] = row["temperature"]
    rows = []
    for name in config.train.chosen:
        for seed in range(config.train.seeds):
            run = _run(name, seed)
            after: Mapping[str, float] = found.get((run, TEMPERATURE), {})
            rows.append(
                {
                    "method": name,
                    "seed": seed,
                    **{metric: found[run, NONE][metric] for metric in METRICS},
                    "temperature": temperatures.get(run),
                    **{f"{metric}_t": after.get(metric) for metric in AFTER},
                    "seconds": storage.read_json(workspace.run(run) / "run.json")["seconds"],
                }
            )
    return rows


def _run(method: str, seed: int) -> str:
    return f"{method}-seed{seed}"
