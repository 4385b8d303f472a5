"""What the report says of the annotators: how well each knows held-out real images, and what it makes of the ratio that went in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from cluster.shards import part_path
from csm import storage, tables
from csm.reannotation import Calibration, apply_calibration, describe, soft_labels
from flows.artifacts import Workspace
from flows.config import Config
from flows.fit_annotators import annotators, calibration_of
from flows.reliability import Predictions, Reliability


class AtRatio(NamedTuple):
    """Of the mixed images with one ratio: mean confidence in class a of the two, raw and calibrated, and the middle 80 % of the latter."""

    ratio: float
    raw: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class AnnotatorResult:
    """An annotator that labelled the mixed images.

    Attributes:
        labels: what its labels are, in some words.
        pair_head: it knows only the two classes of a pair, so its NLL is that of two classes.
        images: held-out real images; ``nll_before`` without calibrator, ``nll`` of images that the calibrator was not fitted on, in nats.
        reliability: on the held-out images, raw and calibrated; None for one that knows only the pair, or is made of others.
        curve: over the first shard of mixed images, by ratio.
    """

    name: str
    description: str
    labels: str
    pair_head: bool
    images: int
    nll_before: float | None
    nll: float | None
    note: str = ""
    reliability: Reliability | None = None
    curve: Sequence[AtRatio] = ()


def read_annotators(workspace: Workspace, config: Config, n_classes: int) -> list[AnnotatorResult]:
    """What the workspace holds of every annotator that was run."""
    plan = tables.read(workspace.plan, tables.PLAN)
    found = []
    for name in annotators(workspace, config):
        annotator, calibration = config.annotate.annotators[name], calibration_of(workspace, name)
        annotations = tables.read_annotations(part_path(workspace.annotations(name), 0), n_classes)
        found.append(
            AnnotatorResult(
                name=name,
                description=annotator.description,
                labels=describe(calibration),
                pair_head=annotator.pair_head,
                images=calibration.images,
                nll_before=calibration.nll_before,
                nll=calibration.nll,
                note=calibration.note,
                reliability=_held_out(workspace, name, calibration),
                curve=by_ratio(confidences(plan, annotations, n_classes, calibration)),
            )
        )
    return found


def confidences(plan: pl.DataFrame, annotations: pl.DataFrame, n_classes: int, calibration: Calibration) -> pl.DataFrame:
    """Of each annotated image: mix_id, lam, ``raw`` and ``share``, the confidence in class a of the two before and after calibration."""
    labels = soft_labels(plan, annotations, n_classes, calibration)
    rows = labels.join(annotations.select("mix_id", "lam_raw"), on="mix_id").join(plan, on="mix_id")
    said, index = rows["soft_label"].to_numpy(), np.arange(len(rows))
    a, b = (said[index, rows[column].to_numpy()].astype(np.float64) for column in ("class_a", "class_b"))
    both = a + b
    share = np.where(both > 0, a / np.where(both > 0, both, 1), 0.5)
    return rows.select("mix_id", "lam", raw=pl.col("lam_raw").clip(0, 1)).with_columns(share=pl.Series(share))


def by_ratio(frame: pl.DataFrame) -> list[AtRatio]:
    """Means and quantiles of ``confidences`` by ratio."""
    grouped = frame.group_by("lam").agg(
        raw=pl.col("raw").mean(),
        low=pl.col("share").quantile(0.1, "linear"),
        mean=pl.col("share").mean(),
        high=pl.col("share").quantile(0.9, "linear"),
    )
    return [AtRatio(*row) for row in grouped.sort("lam").select("lam", "raw", "low", "mean", "high").iter_rows()]


def _held_out(workspace: Workspace, name: str, calibration: Calibration) -> Reliability | None:
    file = workspace.annotator(name) / "held_out.safetensors"
    said = storage.read_tensors(file) if file.is_file() else {}
    if "log_posterior" not in said:
        return None
    raw = said["log_posterior"].double().log_softmax(dim=1)
    top = raw.exp().max(dim=1)
    scaled = apply_calibration(said["log_posterior"], calibration).exp().max(dim=1)
    labels = said["labels"].to(torch.int64)
    return Reliability(
        Predictions(top.values.numpy(), (top.indices == labels).numpy()),
        Predictions(scaled.values.numpy(), (scaled.indices == labels).numpy()),
    )
