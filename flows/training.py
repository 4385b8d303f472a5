"""Classifiers trained over Ray, each with a run of its own in MLflow."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.shards import KEY, part_path, plan_shards
from cluster.training import RunEvent, fit_many
from csm import storage, tables
from csm.datasets import RealDataset
from csm.runs import RunSpec, is_finished
from flows.losses import tell_delay, tell_loss
from flows.progress import task
from flows.stages import Context
from flows.tracking_inputs import mixed_input, real_input

TRACKED_SECONDS = 10.0  # between two batches of epochs in MLflow


def fit_runs(context: Context, specs: Sequence[RunSpec], name: str, kind: str) -> None:
    """Train what is unfinished of ``specs``, with progress and one child run in MLflow for each (tag ``csm.kind`` = ``kind``)."""
    todo = [spec for spec in specs if not is_finished(spec)]
    for spec in specs:
        if spec not in todo and not context.tracker.is_finished(run_key(spec)):  # the session that trained it ended too soon
            _log_finished(context, spec, kind)
    if not todo:
        return
    context.connect()
    by_name = {spec.run: spec for spec in todo}
    heard: dict[str, list[tuple[int, dict[str, float]]]] = {}  # epochs of the classifiers that are being trained
    trained = Counter[str]()  # epochs that each has behind it
    with task(name, sum(spec.optimizer.epochs for spec in todo)) as progress:
        done, told = 0, time.monotonic()

        def tell() -> None:
            """Log the epochs that were heard since the last time."""
            for run, epochs in heard.items():
                context.tracker.log_steps(run_key(by_name[run]), epochs)
                epochs.clear()

        def on_event(event: RunEvent) -> None:
            nonlocal done, told
            if event.kind == "lost":
                reason = f"{event.error}; classifiers start again from their last states"
                tell_loss(context, name, reason, int(event.values["workers"]))
                return
            spec = by_name[event.run]
            if event.run not in heard:
                _open_run(context, spec, kind)
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
                _log_finished(context, spec, kind)
            else:
                context.tracker.log_steps(run_key(spec), epochs)
                context.tracker.close_run(run_key(spec), "FAILED")
            del heard[event.run]

        try:
            config = context.config
            fit_many(todo, config.resources.train, context.workspace.root / "ray", name, on_event, config.train.workers)
        finally:
            tell()
            for run in heard:  # interrupted
                context.tracker.close_run(run_key(by_name[run]), "KILLED")


def _log_finished(context: Context, spec: RunSpec, kind: str) -> None:
    """Log a finished classifier from its files: every epoch, those before an interruption too, and the model."""
    _open_run(context, spec, kind)
    rows = storage.read_json(spec.directory / "history.json")
    steps = [(int(row["epoch"]), {name: value for name, value in row.items() if name != "epoch"}) for row in rows]
    context.tracker.log_steps(run_key(spec), steps)
    for file in ("model.safetensors", "model.json", "predictions.parquet"):
        context.tracker.log_file(run_key(spec), spec.directory / file)
    context.tracker.close_run(run_key(spec))


def run_key(spec: RunSpec) -> str:
    """Key of a classifier's MLflow run."""
    return f"classifier {spec.run} {spec.fingerprint}"


def _open_run(context: Context, spec: RunSpec, kind: str) -> None:
    tags = {"csm.kind": kind, "csm.method": spec.method, "csm.seed": str(spec.seed), "csm.loss": spec.settings.loss}
    if spec.settings.mixed:
        tags["csm.annotator"] = spec.settings.mixed.annotator or ""
    params: dict[str, Any] = {"method": spec.method, "seed": spec.seed, "network": spec.network, **asdict(spec.settings)}
    context.child(run_key(spec), spec.run, tags, {**params, "optimizer": asdict(spec.optimizer)})
    context.tracker.log_inputs(run_key(spec), training_inputs(spec))


def training_inputs(spec: RunSpec) -> list[dict[str, Any]]:
    """The data sets that a classifier is trained on, for ``Tracker.log_inputs``."""
    info = RealDataset.load_info(spec.data)
    inputs = [real_input(info, spec.data)]
    if spec.mixed and spec.settings.mixed:
        shards = plan_shards(spec.mixed.plan, spec.mixed.kind)
        footer = tables.metadata(part_path(spec.mixed.annotations, min(shards))) or {}
        digest = storage.digest(footer.get(KEY), storage.file_digest(spec.mixed.calibration))
        annotator = spec.settings.mixed.annotator or ""
        inputs.append(mixed_input(info, spec.mixed.kind, annotator, digest, sum(shards.values()), spec.mixed.mixed))
    return inputs
