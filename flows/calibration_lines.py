"""What is said of an annotator when its calibrator is fitted: a line on the terminal, and the numbers in MLflow."""

import polars as pl
import torch

from csm.locations import local
from csm.reannotation import Calibration, describe
from flows.annotators import ENSEMBLE
from flows.artifacts import StageRecord, Workspace
from flows.progress import say
from flows.stages import Context


def report(context: Context, record: StageRecord, name: str, calibration: Calibration) -> None:
    """A line on the terminal; the fitted numbers, and all of it as a file, in MLflow."""
    run = f"stage {record.name} {record.fingerprint}"
    names = ("scale", "temperature", "nll_before", "nll_after", "nll")
    values = {key: value for key in names if (value := getattr(calibration, key)) is not None}
    note = f" ({calibration.note})" if calibration.note else ""
    say(f"  {name}: labels {describe(calibration)}{_nll(context, name, calibration)}{note}")
    context.tracker.log_metrics(run, {f"{name}.{key}": value for key, value in values.items()})
    context.tracker.log_file(run, context.workspace.annotator(name) / "calibration.json", name)


def _nll(context: Context, name: str, calibration: Calibration) -> str:
    """The NLL on validation images without calibrator, and of those that the calibrator was not fitted on."""
    if not calibration.images:
        return ""
    annotator = context.config.annotate.annotators[name]
    pair_head = annotator.pair_head
    before, after = ("infinite" if value is None else f"{value:.3f}" for value in (calibration.nll_before, calibration.nll))
    if annotator.head == ENSEMBLE:
        first, then = "pooled", "with members, weights and calibrator fitted on other images (cross-fitted)"
    else:
        first, then = "as it is", "calibrated on other images (cross-fitted)"
    text = f"; {'NLL within pairs' if pair_head else 'NLL'} {before} {first} -> {after} {then}"
    shares = torch.tensor(list(_class_counts(context.workspace).values()), dtype=torch.float64)
    ignorant = torch.distributions.Categorical(shares).entropy().item()
    if not pair_head and calibration.nll is not None and calibration.nll > 0.99 * ignorant:
        text += f", no better than knowing the classes' shares alone ({ignorant:.3f}): check its encoder"
    return text


def _class_counts(workspace: Workspace) -> dict[int, int]:
    """Images of each class in the validation split."""
    labels = pl.scan_parquet(local(workspace.real)).filter(pl.col("split") == "val").select("label").collect()["label"]
    return dict(labels.value_counts().iter_rows())
