"""evaluate: predictions -> metrics.parquet, before and after temperature scaling."""

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import torch

from csm import storage, tables
from csm.datasets import RealDataset
from csm.metrics import METRICS, evaluate
from csm.plots import reliability_diagram
from csm.posthoc import fit_temperature
from csm.runs import RunSpec
from flows.artifacts import StageRecord
from flows.config import Config
from flows.progress import task
from flows.stages import Context, Made, Stage
from flows.summary import Method, summary_table
from flows.train import run_specs
from flows.training import run_key


def _run(context: Context, record: StageRecord) -> Made:
    workspace, bins = context.workspace, context.config.evaluate.bins
    specs = run_specs(context)
    n_classes = RealDataset.load_info(workspace.root).n_classes
    rows: list[dict[str, Any]] = []
    with task("evaluate", len(specs)) as progress:
        for spec in specs:
            logits = {split: split_logits(spec, split, n_classes) for split in ("val", "test")}
            temperature = fit_temperature(*logits["val"])
            measured = _measure(spec, logits, temperature, bins)
            rows += measured
            _log(context, spec, logits["test"], temperature, measured, bins)
            progress.advance()
    metrics = pl.DataFrame(rows, schema=dict(tables.METRICS))
    tables.write(metrics, workspace.metrics, tables.METRICS)
    _log_summary(context, metrics, bins)
    return Made(len(metrics), storage.file_digest(workspace.metrics))


def split_logits(spec: RunSpec, split: str, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (N, K) and labels int64 (N,) of a finished run on ``split``."""
    frame = tables.read(spec.directory / "predictions.parquet", tables.predictions(n_classes)).filter(pl.col("split") == split)
    return torch.from_numpy(frame["logits"].to_numpy().copy()), torch.from_numpy(frame["label"].to_numpy().astype(np.int64))


def compared(config: Config) -> list[Method]:
    """The methods of the comparison, for tables and the report."""
    return [
        Method(name, method.description or name, is_ours=method.mixed is not None, is_baseline=name == "cross-entropy")
        for name, method in config.train.chosen.items()
    ]


def _measure(
    spec: RunSpec, logits: dict[str, tuple[torch.Tensor, torch.Tensor]], temperature: float, bins: int
) -> list[dict[str, Any]]:
    """Rows of the `metrics` table for one run: every metric, on both splits, at temperature 1 and at the fitted one."""
    rows = []
    for split, (scores, labels) in logits.items():
        for fitted, used in ((False, 1.0), (True, temperature)):
            common = {
                "run": spec.run,
                "method": spec.method,
                "seed": spec.seed,
                "split": split,
                "fitted": fitted,
                "temperature": used,
            }
            for metric, value in evaluate(scores, labels, used, bins).items():
                rows.append({**common, "metric": metric, "bins": bins if METRICS[metric].binned else None, "value": value})
    return rows


def _log(
    context: Context,
    spec: RunSpec,
    test: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    rows: list[dict[str, Any]],
    bins: int,
) -> None:
    """Final metrics and the reliability diagram, in the classifier's own MLflow run."""
    key = context.child(run_key(spec), spec.run, {"csm.kind": "classifier"}, {})
    final = {f"{row['split']}_{row['metric']}{'_fitted' if row['fitted'] else ''}": row["value"] for row in rows}
    context.tracker.log_metrics(key, {**final, "temperature": temperature})
    before, after = ((test[0] / scale).softmax(dim=1).max(dim=1) for scale in (1.0, temperature))
    correct = (before.indices == test[1]).numpy()
    figure = reliability_diagram(before.values.numpy(), correct, bins, f"{spec.run}, test", after.values.numpy())
    context.tracker.log_figure(key, figure, "reliability.png")
    context.tracker.close_run(key)


def _log_summary(context: Context, metrics: pl.DataFrame, bins: int) -> None:
    """Means over seeds, in the parent run."""
    summary = summary_table(metrics, compared(context.config), n_bins=bins).filter(pl.col("mean").is_not_null())
    values = {
        f"{row['method']}.{row['metric']}{'_fitted' if row['fitted'] else ''}": row["mean"]
        for row in summary.iter_rows(named=True)
    }
    context.tracker.log_metrics(context.parent_key, values)
    context.tracker.log_file(context.parent_key, context.workspace.metrics)


STAGE = Stage(
    name="evaluate",
    unit="values",
    code_version=2,
    inputs=("prepare", "train"),
    settings=lambda config: {"evaluate": asdict(config.evaluate)},
    outputs=lambda workspace, config: [workspace.metrics],
    run=_run,
)
