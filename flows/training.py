"""Classifiers trained over Ray, each with a run of its own in MLflow."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster.shards import KEY, part_path, plan_shards
from cluster.training import RunEvent, TrainingError, fit_many
from csm import storage, tables
from csm.datasets import RealDataset
from csm.runs import RunSpec, fit_run, is_finished
from flows.losses import tell_delay, tell_loss
from flows.progress import task
from flows.stages import Context
from flows.tracking_inputs import mixed_input, real_input
from flows.twins import adopt

TRACKED_SECONDS = 10.0  # between two batches of epochs in MLflow


def fit_runs(context: Context, specs: Sequence[RunSpec], name: str, kind: str) -> None:
    """Train what is unfinished of ``specs``, with progress and one child run in MLflow for each (tag ``csm.kind`` = ``kind``).

    The members of an ensemble are trained like all others; their MLflow runs are below its own, with the kind ``member``. Of several of one
    fingerprint one is trained.

    Raises:
        TrainingError: some of ``specs`` failed; the others are finished.
    """
    singles = [single for spec in specs for single in spec.singles]
    wholes = {member.run: spec for spec in specs for member in spec.members}
    runs = context.workspace.root / "runs"
    unfinished = [one for one in singles if not is_finished(one)]
    if name not in context.forced:
        unfinished = adopt(runs, unfinished)
    _log_late(context, specs, kind)
    if not unfinished:
        return
    todo = list({spec.fingerprint: spec for spec in reversed(unfinished)}.values())[::-1]
    failed: dict[str, str] = {}
    try:
        _train(context, todo, wholes, name, kind)
    except TrainingError as error:
        failed = {spec.fingerprint: error.errors[spec.run] for spec in todo if spec.run in error.errors}
    adopt(runs, [one for one in unfinished if not is_finished(one)])
    _log_late(context, specs, kind)
    errors = {spec.run: failed[one.fingerprint] for spec in specs for one in spec.singles if one.fingerprint in failed}
    if errors:
        raise TrainingError(errors, sum(any(one in unfinished for one in spec.singles) for spec in specs))


def _train(context: Context, todo: Sequence[RunSpec], wholes: Mapping[str, RunSpec], name: str, kind: str) -> None:
    """Train ``todo``; ``wholes``: run -> the ensemble that it is a member of."""
    context.connect()
    by_name = {spec.run: spec for spec in todo}
    heard: dict[str, list[tuple[int, dict[str, float]]]] = {}  # epochs of the classifiers that are being trained
    trained = Counter[str]()  # epochs that each has behind it
    opened: dict[str, RunSpec] = {}  # ensembles
    with task(name, sum(spec.optimizer.epochs for spec in todo)) as progress:
        done, told = 0, time.monotonic()

        def tell() -> None:
            """Log the epochs that were heard since the last time."""
            for run, epochs in heard.items():
                context.tracker.log_steps(run_key(by_name[run]), epochs)
                epochs.clear()

        def open_run(spec: RunSpec) -> None:
            whole = wholes.get(spec.run)
            if whole and whole.run not in opened:
                _open_run(context, whole, kind)
                opened[whole.run] = whole
            _open_run(context, spec, kind, whole)

        def on_event(event: RunEvent) -> None:
            nonlocal done, told
            if event.kind == "lost":
                reason = f"{event.error}; classifiers start again from their last states"
                tell_loss(context, name, reason, int(event.values["workers"]))
                return
            spec = by_name[event.run]
            if event.run not in heard:
                open_run(spec)
            epochs = heard.setdefault(event.run, [])
            if event.kind == "resumed":
                tell_delay(context, name, f"{event.run} goes on from epoch {event.epoch}", **event.values)
                return
            if event.kind == "epoch":
                if event.epoch > trained[event.run]:
                    progress.advance(event.epoch - trained[event.run], f"{done}/{len(todo)} classifiers")
                    trained[event.run] = event.epoch
                epochs.append((event.epoch, event.values))
                if time.monotonic() - told > TRACKED_SECONDS:
                    told = time.monotonic()
                    tell()
                return
            done += 1
            progress.advance(0, f"{done}/{len(todo)} classifiers")
            if event.kind == "done":
                _log_finished(context, spec, kind, wholes.get(spec.run))
            else:
                context.tracker.log_steps(run_key(spec), epochs)
                context.tracker.close_run(run_key(spec), "FAILED")
            del heard[event.run]

        status = "KILLED"
        try:
            config = context.config
            fit_many(todo, config.resources.train, context.workspace.root / "ray", name, on_event, config.train.workers)
        except TrainingError:
            status = "FAILED"
            raise
        finally:
            tell()
            for run in heard:  # interrupted
                context.tracker.close_run(run_key(by_name[run]), "KILLED")
            for whole in opened.values():
                if not all(is_finished(member) for member in whole.members):
                    context.tracker.close_run(run_key(whole), status)


def _log_late(context: Context, specs: Sequence[RunSpec], kind: str) -> None:
    """Make the ensembles whose members are finished, and log what is finished and MLflow does not have: these ensembles, and what was
    trained under another name or in a session that ended too soon.
    """
    for spec in specs:
        late = [one for one in spec.members if is_finished(one) and not context.tracker.is_finished(run_key(one))]
        if late:
            _open_run(context, spec, kind)
        for member in late:
            _log_finished(context, member, kind, spec)
        if spec.members and not is_finished(spec) and all(is_finished(one) for one in spec.members):
            fit_run(spec)
        if is_finished(spec) and (late or not context.tracker.is_finished(run_key(spec))):
            _log_finished(context, spec, kind)


def _log_finished(context: Context, spec: RunSpec, kind: str, whole: RunSpec | None = None) -> None:
    """Log a finished classifier from its files: every epoch, those before an interruption too, and the model, if no ensemble has it."""
    _open_run(context, spec, kind, whole)
    rows = [] if spec.members else storage.read_json(spec.directory / "history.json")
    steps = [(int(row["epoch"]), {name: value for name, value in row.items() if name != "epoch"}) for row in rows]
    context.tracker.log_steps(run_key(spec), steps)
    for file in () if whole else ("model.safetensors", "model.json", "predictions.parquet"):
        context.tracker.log_file(run_key(spec), spec.directory / file)
    context.tracker.close_run(run_key(spec))


def run_key(spec: RunSpec) -> str:
    """Key of a classifier's MLflow run."""
    return f"classifier {spec.run} {spec.fingerprint}"


def _open_run(context: Context, spec: RunSpec, kind: str, whole: RunSpec | None = None) -> None:
    """Open the MLflow run of ``spec``: a child of the open one of ``whole``, the ensemble that it is a member of, if it is."""
    tags = {
        "csm.kind": "member" if whole else kind,
        "csm.method": spec.method,
        "csm.seed": str(spec.seed),
        "csm.loss": spec.settings.loss,
    }
    if spec.settings.mixed:
        tags["csm.annotator"] = spec.settings.mixed.annotator or ""
    params: dict[str, Any] = {"method": spec.method, "seed": spec.seed, "network": spec.network, **asdict(spec.settings)}
    params["optimizer"] = asdict(spec.optimizer)
    context.child(run_key(spec), spec.run, tags, params, run_key(whole) if whole else None)
    context.tracker.log_inputs(run_key(spec), training_inputs(spec))


def training_inputs(spec: RunSpec) -> list[dict[str, Any]]:
    """The data sets that a classifier is trained on, for ``Tracker.log_inputs``."""
    info = RealDataset.load_info(spec.data)
    inputs = [real_input(info, spec.data)]
    if spec.mixed and spec.settings.mixed:
        annotator, calibration = spec.settings.mixed.annotator or "", storage.file_digest(spec.mixed.calibration)
        for kind in spec.mixed.kinds:
            shards = plan_shards(spec.mixed.plan, kind)
            footer = tables.metadata(part_path(spec.mixed.annotations, min(shards))) or {}
            digest = storage.digest(footer.get(KEY), calibration)
            inputs.append(mixed_input(info, kind, annotator, digest, sum(shards.values()), spec.mixed.mixed))
    return inputs
