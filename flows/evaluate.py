"""evaluate: predictions -> metrics.parquet, as trained and after each post-hoc method, and comparison.parquet."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from csm import storage, tables
from csm.datasets import RealDataset
from csm.metrics import METRICS, evaluate
from csm.plots import reliability_diagram
from csm.posthoc import Posthoc, apply_posthoc, fit_posthoc
from csm.runs import RunSpec
from flows.artifacts import StageRecord, Workspace
from flows.comparison import compare
from flows.config import Config
from flows.progress import say, task
from flows.stages import Context, Made, Stage
from flows.summary import NONE, TEMPERATURE, Method, baseline_of, summary_table
from flows.train import run_specs
from flows.training import run_key

Split = tuple[Tensor, Tensor]  # logits (N, K) and labels (N,)


def _run(context: Context, record: StageRecord) -> Made:
    workspace, settings = context.workspace, context.config.evaluate
    specs = run_specs(context)
    n_classes = RealDataset.load_info(workspace.root).n_classes
    rows: list[dict[str, Any]] = []
    fitted: dict[tuple[str, str], Posthoc] = {}
    with task("evaluate", len(specs)) as progress:
        for spec in specs:
            splits = {split: split_logits(spec, split, n_classes) for split in ("val", "test")}
            of_run = {name: fit_posthoc(name, *splits["val"], where=spec.run) for name in posthoc_names(context.config)}
            measured = [row for posthoc in of_run.values() for row in _measure(spec, splits, posthoc, settings.bins)]
            _log(context, spec, splits["test"], of_run, measured, settings.bins)
            fitted |= {(spec.run, name): posthoc for name, posthoc in of_run.items()}
            rows += measured
            progress.advance()
    for name, note in dict.fromkeys((posthoc.name, posthoc.note) for posthoc in fitted.values() if posthoc.note):
        say(f"  {name}: {note}")
    metrics = pl.DataFrame(rows, schema=dict(tables.METRICS))
    tables.write(metrics, workspace.metrics, tables.METRICS)
    comparison = _compare(context, specs, fitted, n_classes)
    tables.write(comparison, workspace.comparison, tables.COMPARISON)
    _log_summary(context, metrics)
    return Made(len(metrics), storage.digest(storage.file_digest(workspace.metrics), storage.file_digest(workspace.comparison)))


def posthoc_names(config: Config) -> tuple[str, ...]:
    """Post-hoc methods that are measured, "none" first."""
    return tuple(dict.fromkeys((NONE, *config.evaluate.posthoc)))


def split_logits(spec: RunSpec, split: str, n_classes: int) -> Split:
    """Logits float32 (N, K) and labels int64 (N,) of a finished run on ``split``."""
    frame = tables.read(spec.directory / "predictions.parquet", tables.predictions(n_classes)).filter(pl.col("split") == split)
    return torch.from_numpy(frame["logits"].to_numpy().copy()), torch.from_numpy(frame["label"].to_numpy().astype(np.int64))


def compared(config: Config) -> list[Method]:
    """The methods of the comparison, for tables and the report."""
    return [
        Method(
            name,
            method.description or name,
            is_ours=method.mixed is not None and method.mixed.is_semantic,
            is_baseline=name == "cross-entropy",
        )
        for name, method in config.train.chosen.items()
    ]


def training_cost(workspace: Workspace, config: Config) -> dict[str, float]:
    """Device-seconds that one training by each method took, of an ensemble all its members', mean over seeds: GPUs if the workers have
    any, else CPU cores.
    """
    return {
        name: _devices(config) * sum(record["seconds"] for record in records) / len(records)
        for name, records in _run_records(workspace, config).items()
    }


def training_spent(workspace: Workspace, config: Config) -> float:
    """Device-seconds of all trainings; one that two methods share counts once."""
    records = [record for of_method in _run_records(workspace, config).values() for record in of_method]
    singles = {single["fingerprint"]: single["seconds"] for record in records for single in record.get("members", [record])}
    return _devices(config) * float(sum(singles.values()))


def _run_records(workspace: Workspace, config: Config) -> dict[str, list[dict[str, Any]]]:
    """Of each method the ``run.json`` of its seeds."""
    return {
        name: [storage.read_json(workspace.run(f"{name}-seed{seed}") / "run.json") for seed in range(config.train.seeds)]
        for name in config.train.chosen
    }


def _devices(config: Config) -> float:
    return config.train.workers * (config.resources.train.gpus or config.resources.train.cpus)


def device(config: Config) -> str:
    """What ``training_cost`` counts, as a table heads it."""
    return "GPU s" if config.resources.train.gpus else "core s"


def _measure(spec: RunSpec, splits: Mapping[str, Split], posthoc: Posthoc, bins: int) -> Iterator[dict[str, Any]]:
    """Rows of the `metrics` table for one run after ``posthoc``: every metric, on both splits."""
    temperature = posthoc.values["temperature"] if posthoc.name == TEMPERATURE else 1.0
    for split, (logits, labels) in splits.items():
        # As trained, not through log-probabilities: their rounding may push a confidence off the bin edge that it lies on.
        scores = logits if posthoc.name == NONE else apply_posthoc(logits, posthoc)
        for metric, value in evaluate(scores, labels, n_bins=bins).items():
            yield {
                "run": spec.run,
                "method": spec.method,
                "seed": spec.seed,
                "split": split,
                "posthoc": posthoc.name,
                "temperature": temperature,
                "metric": metric,
                "bins": bins if METRICS[metric].binned else None,
                "value": value,
            }


class _Calibrated(Mapping[str, list[Split]]):
    """Test predictions of each method after a post-hoc method, read when asked for: those of all methods may not fit into memory."""

    def __init__(self, specs: list[RunSpec], fitted: Mapping[tuple[str, str], Posthoc], posthoc: str, n_classes: int) -> None:
        self.posthoc = posthoc
        self.fitted = fitted
        self.read = partial(split_logits, split="test", n_classes=n_classes)
        self.specs: dict[str, list[RunSpec]] = {}
        for spec in specs:
            self.specs.setdefault(spec.method, []).append(spec)

    def __getitem__(self, method: str) -> list[Split]:
        predictions = []
        for spec in self.specs[method]:
            logits, labels = self.read(spec)
            predictions.append((apply_posthoc(logits, self.fitted[spec.run, self.posthoc]), labels))
        return predictions

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _compare(context: Context, specs: list[RunSpec], fitted: Mapping[tuple[str, str], Posthoc], n_classes: int) -> pl.DataFrame:
    settings, baseline = context.config.evaluate, baseline_of(compared(context.config))
    say(f"  comparing {len(context.config.train.chosen)} methods in {settings.draws:,} resamples of the test images and seeds")
    return pl.concat(
        compare(
            _Calibrated(specs, fitted, name, n_classes), name, baseline, settings.bins, settings.draws, context.config.train.seeds
        )
        for name in posthoc_names(context.config)
    )


def _log(
    context: Context,
    spec: RunSpec,
    test: Split,
    fitted: Mapping[str, Posthoc],
    rows: list[dict[str, Any]],
    bins: int,
) -> None:
    """Final metrics and the reliability diagram, in the classifier's own MLflow run."""
    key = context.child(run_key(spec), spec.run, {"csm.kind": "classifier"}, {})
    context.tracker.log_metrics(key, {f"{row['split']}_{row['metric']}{_suffix(row['posthoc'])}": row["value"] for row in rows})
    before = test[0].softmax(dim=1).max(dim=1)
    after = None
    if TEMPERATURE in fitted:
        context.tracker.log_metrics(key, {"temperature": fitted[TEMPERATURE].values["temperature"]})
        after = apply_posthoc(test[0], fitted[TEMPERATURE]).exp().amax(dim=1).numpy()
    correct = (before.indices == test[1]).numpy()
    figure = reliability_diagram(before.values.numpy(), correct, bins, f"{spec.run}, test", after)
    context.tracker.log_figure(key, figure, "reliability.png")
    context.tracker.close_run(key)


def _log_summary(context: Context, metrics: pl.DataFrame) -> None:
    """Means over seeds, in the parent run."""
    summary = summary_table(metrics, compared(context.config), n_bins=context.config.evaluate.bins)
    values = {
        f"{row['method']}.{row['metric']}{_suffix(row['posthoc'])}": row["mean"]
        for row in summary.filter(pl.col("mean").is_not_null()).iter_rows(named=True)
    }
    context.tracker.log_metrics(context.parent_key, values)
    for file in (context.workspace.metrics, context.workspace.comparison):
        context.tracker.log_file(context.parent_key, file)


def _suffix(posthoc: str) -> str:
    return "" if posthoc == NONE else f"_{posthoc}"


def _settings(config: Config) -> dict[str, Any]:
    evaluate = asdict(config.evaluate)
    del evaluate["shifts"]  # of evaluate-shift
    return {"evaluate": evaluate}


STAGE = Stage(
    name="evaluate",
    unit="values",
    code_version=3,
    inputs=("prepare", "train"),
    settings=_settings,
    outputs=lambda workspace, config: [workspace.metrics, workspace.comparison],
    run=_run,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
