"""A workspace with classifiers that were trained by a direct call, without Ray, for the tests of the finished model."""

from dataclasses import replace
from pathlib import Path

from csm import storage
from csm.runs import fit_run
from flows.artifacts import Workspace
from flows.config import load_config
from flows.reuse import run_stage
from flows.run import STAGES
from flows.stages import Context, Made
from flows.train import run_specs

SETTINGS = (
    "name=small",
    "train.compare=[cross-entropy, label-smoothing]",
    "train.seeds=2",
    "train.parameters={width: 4}",
    "train.optimizer.epochs=1",
)


def _train(context, record):
    specs = run_specs(context)
    for spec in specs:
        fit_run(spec)
    return Made(len(specs), storage.digest(*(spec.fingerprint for spec in specs)))


def context_of(root: Path, *overrides: str, forced: tuple[str, ...] = ()) -> Context:
    """Of a command in the workspace ``root``."""
    stages = {**STAGES, "train": replace(STAGES["train"], run=_train)}
    root.mkdir(parents=True, exist_ok=True)
    return Context(load_config("digits", [*SETTINGS, *overrides]), Workspace(root), stages, forced=frozenset(forced))


def run_stages(context: Context, *names: str) -> dict[str, bool]:
    """Bring stages up to date and give which were reused."""
    try:
        for name in names:
            run_stage(context, name)
    finally:
        context.close("FINISHED")
    return {name: outcome["reused"] for name, outcome in context.outcomes.items()}
