"""run: the whole pipeline, or any part of it, in one workspace.

As every verb's file it is also a script, for `ray submit CLUSTER.yaml flows/run.py -- --config NAME --workspace DIR`.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import polars as pl

from cluster.session import require_answer
from csm import tables
from csm.errors import InputError
from flows import (
    annotate,
    evaluate,
    evaluate_shift,
    fit_annotators,
    fit_teacher,
    generator,
    mix,
    model,
    plan,
    prepare,
    report,
    shift,
    train,
)
from flows.artifacts import Workspace, open_workspace
from flows.config import Config
from flows.result_tables import posthoc_table, shift_table, terminal_table
from flows.reuse import refuse_replacing, require, run_stages
from flows.shift_summary import shift_tables
from flows.stages import Context
from flows.summary import summary_table
from flows.tracking_address import OWN, Address

STAGES = {
    stage.name: stage
    for stage in (
        prepare.STAGE,
        shift.STAGE,
        generator.STAGE,
        fit_teacher.STAGE,
        fit_annotators.STAGE,
        plan.STAGE,
        mix.STAGE,
        annotate.STAGE,
        train.STAGE,
        model.STAGE,
        evaluate_shift.STAGE,
        evaluate.STAGE,
        report.STAGE,
    )
}
RAY_STAGES = frozenset({"generator", "fit-teacher", "fit-annotators", "mix", "annotate", "train", "evaluate-shift"})
VERBS = {
    name: (name,)
    for name in STAGES
    if name not in ("generator", "fit-teacher", "fit-annotators", "annotate", "train", "model", "evaluate-shift")
}
MIXING = ("generator", "fit-annotators", "plan", "mix", "annotate")  # what only methods with mixed images need
VERBS |= {"fit-generator": ("generator",), "import-generator": ("prepare", "generator")}
VERBS |= {"train": ("train", "model"), "evaluate": ("shift", "evaluate-shift", "evaluate")}
VERBS |= {"annotate": ("fit-annotators", "annotate"), "run": tuple(name for name in STAGES if name != "fit-teacher")}


def run_verb(
    verb: str,
    config: Config,
    workspace: Path,
    address: str = "local",
    command: str = "",
    forced: Sequence[str] = (),
    tracking: Address = OWN,
) -> dict[str, Any]:
    """Run the stages of ``verb`` in ``workspace`` and return what ``--json`` prints.

    Returns:
        workspace, report and metrics (paths, or null when they are not made yet), seconds, and stages: name -> seconds, reused, rows.
    """
    tracking.check_workspace(workspace)
    require_answer(address)
    if "generator" in VERBS[verb]:
        generator.check_generator(verb, config.generator)
    with open_workspace(workspace) as opened, terminable():
        with Context(config, opened, STAGES, address, command, frozenset(forced), tracking) as context:
            # What prepare will find is not known yet: other data may be there from before.
            names = verb_stages(verb, config if "prepare" in VERBS[verb] else context.resolved)
            refuse_replacing(context, names)
            context.send_waiting()
            # What it lacks is said before the teacher is trained, or shift sets are made.
            if verb in ("plan", "train", "evaluate"):
                require(context, verb, [name for name in STAGES[verb].reads(context.resolved) if name not in names])
            if verb == "train":  # `run` does so when the data are there: a name that is taken is said before anything is trained
                model.check_registry(context)
            if address != "local" and not RAY_STAGES.isdisjoint(names):
                context.connect()  # now, rather than after an hour of other work
            run_stages(context, names)
        return {
            "workspace": str(workspace),
            "report": str(opened.report) if opened.report.is_file() else None,
            "metrics": str(opened.metrics) if opened.metrics.is_file() else None,
            "seconds": round(sum(outcome["seconds"] for outcome in context.outcomes.values()), 3),
            "stages": context.outcomes,
        }


def verb_stages(verb: str, config: Config) -> tuple[str, ...]:
    """Stages that ``verb`` runs: ``VERBS``, and of those without a verb the teacher, where it is asked; shift sets where there are any.

    ``run`` leaves out what only mixed images need if no method trains on them.
    """
    names = VERBS[verb]
    if not config.evaluate.shifts:
        if verb == "shift":
            raise InputError("evaluate.shifts: no set is configured; for example --set evaluate.shifts.corrupted.kind=corrupted")
        names = tuple(name for name in names if name not in ("shift", "evaluate-shift"))
    if verb == "run" and not config.mixes:
        names = tuple(name for name in names if name not in MIXING)
    asking = [name for name in ("fit-annotators", "plan") if name in names and "fit-teacher" in STAGES[name].reads(config)]
    if not asking:
        return names
    first = names.index(asking[0])
    return (*names[:first], "fit-teacher", *names[first:])


def results_tables(config: Config, root: Path) -> list[Any]:
    """The results in a workspace as rich tables: methods against the baseline on the test split, post-hoc methods, shift sets."""
    workspace, methods = Workspace(root), evaluate.compared(config)
    metrics: pl.DataFrame = tables.read(workspace.metrics, tables.METRICS)
    comparison = tables.read(workspace.comparison, tables.COMPARISON)
    summary = summary_table(metrics, methods, comparison, n_bins=config.evaluate.bins)
    main = terminal_table(summary, methods, evaluate.training_cost(workspace, config), evaluate.device(config))
    more = posthoc_table(summary, methods)
    shifts = shift_tables(evaluate_shift.shift_metrics(workspace, config), methods)
    return [main, *([more] if more else []), *(shift_table(shift) for shift in shifts)]


@contextmanager
def terminable() -> Iterator[None]:
    """A polite kill (SIGTERM, as cluster managers send it) stops the work as Ctrl-C does: cleanly, ready to go on."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
