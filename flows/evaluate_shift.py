"""evaluate-shift: every trained classifier on every shift set, over Ray -> shift_metrics.parquet."""

from pathlib import Path

import polars as pl

from cluster.prediction import Measured, measure_shifts
from csm import storage, tables
from csm.datasets import RealDataset
from csm.shift_metrics import ShiftJob, is_measured, read_shift_metrics
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.losses import tell_loss
from flows.progress import task
from flows.shift import shift_files, shift_record
from flows.stages import Context, Made, Stage
from flows.train import run_specs

CODE_VERSION = 1


def shift_metrics(workspace: Workspace, config: Config) -> pl.DataFrame:
    """The `shift_metrics` table; empty where no shift set is configured."""
    if not config.evaluate.shifts:
        return pl.DataFrame(schema=dict(tables.SHIFT_METRICS))
    return tables.read(workspace.shift_metrics, tables.SHIFT_METRICS)


def _run(context: Context, record: StageRecord) -> Made:
    workspace = context.workspace
    jobs = _jobs(context)
    todo = {job.run for job in jobs if not is_measured(job)}
    if todo:
        context.connect()
        with task("evaluate-shift", len(todo)) as progress:

            def on_measured(measured: Measured) -> None:
                progress.advance(1, "classifiers")

            def on_lost(run: str) -> None:
                tell_loss(context, record.name, f"the worker that measured {run} was lost; another one starts")

            measure_shifts(jobs, context.config.resources.train, on_measured, on_lost)
    metrics = pl.concat([read_shift_metrics(job) for job in jobs])
    tables.write(metrics, workspace.shift_metrics, tables.SHIFT_METRICS)
    context.tracker.log_file(context.parent_key, workspace.shift_metrics)
    return Made(len(metrics), storage.file_digest(workspace.shift_metrics))


def _jobs(context: Context) -> list[ShiftJob]:
    """One for each run and set."""
    workspace, config = context.workspace, context.config
    info = RealDataset.load_info(workspace.root)
    jobs = []
    for spec in run_specs(context):
        for name in config.evaluate.shifts:
            parts = tuple(path.absolute() for path in shift_files(workspace, name))
            job = ShiftJob(
                run=spec.run,
                method=spec.method,
                seed=spec.seed,
                directory=spec.directory,
                shift=name,
                parts=parts,
                shape=info.shape,
                n_classes=info.n_classes,
                n_bins=config.evaluate.bins,
                key=storage.digest(CODE_VERSION, spec.fingerprint, shift_record(workspace, name).checksums, config.evaluate.bins),
            )
            jobs.append(job)
    return jobs


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    runs = [workspace.run(f"{name}-seed{seed}") for seed in range(config.train.seeds) for name in config.train.chosen]
    results = [run / "shift" / f"{shift}.parquet" for run in runs for shift in config.evaluate.shifts]
    return [workspace.shift_metrics, *results]


STAGE = Stage(
    name="evaluate-shift",
    unit="values",
    code_version=CODE_VERSION,
    inputs=("prepare", "shift", "train"),
    settings=lambda config: {"shifts": list(config.evaluate.shifts), "bins": config.evaluate.bins},
    outputs=_outputs,
    run=_run,
    incremental=True,
)
