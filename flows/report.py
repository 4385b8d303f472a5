"""report: everything that the workspace holds -> report.html, one file."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from cluster.shards import part_path
from csm import storage, tables
from csm.datasets import DatasetInfo, RealDataset
from csm.reannotation import soft_labels
from flows import reporting
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.evaluate import compared, device, split_logits, training_cost
from flows.evaluate_shift import shift_metrics
from flows.fit_annotators import annotators, calibration_of
from flows.progress import say
from flows.reliability import Predictions, Reliability
from flows.report_annotators import read_annotators
from flows.report_run import device_seconds, finished_model, machine, repeat
from flows.report_sweep import read_sweep
from flows.stages import Context, Made, Stage
from flows.summary import TEMPERATURE
from flows.train import run_specs

GALLERY_SETS = 8  # mixed sets shown, of as many different pairs
SAMPLES = 8  # pictures of each class


def _run(context: Context, record: StageRecord) -> Made:
    workspace, config = context.workspace, context.config
    data = RealDataset.load(workspace.root)
    info = data.info
    metrics = tables.read(workspace.metrics, tables.METRICS)
    cost = training_cost(workspace, config)
    page = reporting.render(
        reporting.Report(
            title=f"{config.name}: {info.name}",
            created=datetime.now(UTC),
            command=context.command,
            machine=machine(),
            config_yaml=context.resolved.to_yaml(),
            dataset=reporting.Dataset(info.name, info.class_names, info.counts, info.shape),
            stages=_stages(context, device_seconds(workspace, config, cost)),
            methods=compared(config),
            metrics=metrics,
            comparison=tables.read(workspace.comparison, tables.COMPARISON),
            shift_metrics=shift_metrics(workspace, config),
            cost=cost,
            device=device(config),
            reliability=_reliability(context, metrics, info.n_classes),
            annotators=read_annotators(workspace, config, info.n_classes) if config.mixes else [],
            sweep=read_sweep(workspace.root),
            model=finished_model(workspace),
            repeat=repeat(workspace, list(context.stages), context.command, info.digest),
            gallery=_gallery(context, info) if config.mixes else [],
            data_samples=_data_samples(data),
            generator_samples=_generator_samples(workspace, info) if config.mixes else [],
            n_bins=config.evaluate.bins,
        )
    )
    storage.write_text(workspace.report, page)
    context.tracker.log_file(context.parent_key, workspace.report)
    context.tracker.log_file(context.parent_key, workspace.config)
    say(f"  {workspace.report}: {len(page) / 2**20:.1f} MiB")
    return Made(len(compared(config)), storage.file_digest(workspace.report))


def _stages(context: Context, busy: Mapping[str, float]) -> list[reporting.Stage]:
    """What each stage took when it was last done, ``busy``: its workers, and whether this command did it."""
    stages = []
    for name in context.stages:
        record = context.workspace.record(name)
        if record is not None and record.done:
            reused = bool(context.outcomes.get(name, {"reused": True})["reused"])
            stages.append(reporting.Stage(name, record.seconds, reused, record.rows, busy.get(name)))
    return stages


def _reliability(context: Context, metrics: pl.DataFrame, n_classes: int) -> dict[str, Reliability]:
    """Top class of every test image with every seed, before and after each run's temperature."""
    temperatures = dict(metrics.filter(posthoc=TEMPERATURE).select("run", "temperature").unique().iter_rows())
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for spec in run_specs(context):
        logits, labels = split_logits(spec, "test", n_classes)
        before = logits.double().softmax(dim=1).max(dim=1)
        after = (logits.double() / temperatures.get(spec.run, 1.0)).softmax(dim=1).amax(dim=1)
        found.setdefault(spec.method, []).append((before.values, after, before.indices == labels))
    result = {}
    for method, seeds in found.items():
        before_, after_, correct = (torch.stack(column).numpy() for column in zip(*seeds, strict=True))  # (S, N)
        result[method] = Reliability(Predictions(before_, correct), Predictions(after_, correct) if temperatures else None)
    return result


class Said(NamedTuple):
    """What an annotator says of mixed images by mix_id: soft labels, confidence in class a of the two before calibration."""

    labels: dict[str, list[float]]
    raw: dict[str, float]
    all_classes: bool


def _gallery(context: Context, info: DatasetInfo) -> list[reporting.MixedSet]:
    """Sets of different pairs out of the first shard, spread over the pairs, with what each annotator says."""
    workspace, config = context.workspace, context.config
    mixed = tables.read(part_path(workspace.mixed, 0), tables.MIXED)
    plan = tables.read(workspace.plan, tables.PLAN)
    table = plan.join(mixed, on="mix_id", how="inner", maintain_order="left")
    said = {}
    for name in annotators(workspace, config):
        calibration = calibration_of(workspace, name)
        annotations = tables.read_annotations(part_path(workspace.annotations(name), 0), info.n_classes)
        labels = soft_labels(plan, annotations, info.n_classes, calibration)
        raw = dict(annotations.select("mix_id", pl.col("lam_raw").clip(0, 1)).iter_rows())
        said[name] = Said(dict(labels.iter_rows()), raw, not calibration.pair)
    sets = table.partition_by("group", "class_a", "class_b", maintain_order=True)
    spread = np.unique(np.linspace(0, len(sets) - 1, min(GALLERY_SETS, len(sets))).round().astype(int))
    return [_mixed_set(sets[index], said, info) for index in spread]


def _mixed_set(rows: pl.DataFrame, said: Mapping[str, Said], info: DatasetInfo) -> reporting.MixedSet:
    first = rows.row(0, named=True)
    class_a, class_b = first["class_a"], first["class_b"]
    images = tables.to_images(rows["image"], info.shape).permute(0, 2, 3, 1).numpy()
    cells = []
    for image, row in zip(images, rows.iter_rows(named=True), strict=True):
        annotations = {}
        for name, annotator in said.items():
            label = np.asarray(annotator.labels[row["mix_id"]])
            pair = label[class_a] + label[class_b]
            share = float(label[class_a] / pair) if pair > 0 else 0.5
            outside = float(np.clip(1 - pair, 0, 1)) if annotator.all_classes else None
            top = info.class_names[int(label.argmax())] if annotator.all_classes else ""
            annotations[name] = reporting.Annotation(share, outside, top, annotator.raw[row["mix_id"]])
        cells.append(reporting.Cell(float(row["lam"]), image, annotations))
    return reporting.MixedSet(info.class_names[class_a], info.class_names[class_b], cells)


def _data_samples(data: RealDataset) -> list[tuple[str, list[NDArray[np.uint8]]]]:
    images, labels = data.split("train")
    pictures = images.permute(0, 2, 3, 1).numpy()
    return [(name, list(pictures[(labels == k).numpy()][:SAMPLES])) for k, name in enumerate(data.info.class_names)]


def _generator_samples(workspace: Workspace, info: DatasetInfo) -> list[tuple[str, list[NDArray[np.uint8]]]]:
    file = workspace.generator / "samples.safetensors"
    if not file.is_file():  # of an imported generator, whose samples could take hours here
        return []
    pictures = storage.read_tensors(file)["images"].permute(0, 2, 3, 1).numpy()
    per_class = len(pictures) // info.n_classes
    return [(name, list(pictures[k * per_class : (k + 1) * per_class])) for k, name in enumerate(info.class_names)]


def _more_inputs(config: Config) -> tuple[str, ...]:
    mixing = ("generator", "plan", "mix", "fit-annotators", "annotate") if config.mixes else ()
    return (*mixing, "evaluate-shift") if config.evaluate.shifts else mixing


def _also_reads(workspace: Workspace) -> list[Path]:
    root = workspace.root
    return [root / "sweep.parquet", root / "best.yaml", root / "tune" / "importance.json", root / "model" / "model.json"]


STAGE = Stage(
    name="report",
    unit="methods",
    code_version=3,
    inputs=("prepare", "train", "evaluate"),
    settings=lambda config: {"name": config.name, "methods": [method.__dict__ for method in compared(config)]},
    more_inputs=_more_inputs,
    also_reads=_also_reads,
    outputs=lambda workspace, config: [workspace.report],
    run=_run,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
