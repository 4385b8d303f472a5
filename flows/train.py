"""train: every method with every seed, in one Ray Train worker group."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from cluster.training import RunEvent, fit_many
from csm import storage
from csm.datasets import RealDataset
from csm.runs import MixedSource, RunSpec, is_finished
from flows.artifacts import StageRecord
from flows.config import Config
from flows.progress import task
from flows.stages import Context, Made, Stage


def run_specs(context: Context, annotated: str) -> list[RunSpec]:
    """All runs of the comparison, seed by seed; ``annotated`` is the digest of the annotate stage."""
    workspace, train = context.workspace, context.config.train
    info = RealDataset.load_info(workspace.root)
    specs = []
    for seed in range(train.seeds):
        for name, method in train.chosen.items():
            source = None
            if method.mixed:
                source = MixedSource(
                    plan=workspace.plan.absolute(),
                    mixed=workspace.mixed.absolute(),
                    annotations=workspace.annotations(method.mixed.annotator).absolute(),
                    calibration=(workspace.annotator(method.mixed.annotator) / "calibration.json").absolute(),
                )
            settings = {**asdict(method), "description": ""}
            trained_on = [info.digest, annotated if method.mixed else ""]
            common = [train.network, train.parameters, asdict(train.optimizer), seed]
            spec = RunSpec(
                run=f"{name}-seed{seed}",
                method=name,
                seed=seed,
                directory=workspace.run(f"{name}-seed{seed}").absolute(),
                data=workspace.root.absolute(),
                network=train.network,
                parameters=train.parameters,
                settings=method,
                optimizer=train.optimizer,
                mixed=source,
                fingerprint=storage.digest("run", settings, *trained_on, *common),
            )
            specs.append(spec)
    return specs


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
    with task(name, sum(spec.optimizer.epochs for spec in todo)) as progress:
        done = 0

        def on_event(event: RunEvent) -> None:
            nonlocal done
            spec = by_name[event.run]
            if event.run not in heard:
                _open_run(context, spec, kind)
            epochs = heard.setdefault(event.run, [])
            if event.kind == "epoch":
                epochs.append((event.epoch, event.values))
                progress.advance(1, f"{done}/{len(todo)} classifiers")
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
            fit_many(todo, context.config.resources.train, context.workspace.root / "ray", name, on_event)
        finally:
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
        tags["csm.annotator"] = spec.settings.mixed.annotator
    params: dict[str, Any] = {"method": spec.method, "seed": spec.seed, "network": spec.network, **asdict(spec.settings)}
    context.child(run_key(spec), spec.run, tags, {**params, "optimizer": asdict(spec.optimizer)})


def _run(context: Context, record: StageRecord) -> Made:
    specs = run_specs(context, record.inputs["annotate"])
    fit_runs(context, specs, "train", "classifier")
    return Made(len(specs), storage.digest(*(spec.fingerprint for spec in specs)))


def _settings(config: Config) -> dict[str, Any]:
    chosen = {name: asdict(replace(method, description="")) for name, method in config.train.chosen.items()}
    return {"train": {**asdict(config.train), "methods": chosen, "compare": list(chosen)}}


STAGE = Stage(
    name="train",
    unit="classifiers",
    code_version=1,
    inputs=("prepare", "annotate"),
    settings=_settings,
    outputs=lambda workspace, config: [
        workspace.run(f"{name}-seed{seed}") / "run.json" for seed in range(config.train.seeds) for name in config.train.chosen
    ],
    run=_run,
    incremental=True,
)
