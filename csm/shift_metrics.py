"""How a trained classifier fares on a shift set: its images are read part by part, its numbers kept beside the classifier."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from csm import tables
from csm.classifiers import Classifier, in_batches, load_classifier
from csm.errors import InputError
from csm.metrics import evaluate
from csm.metrics.ood import OOD, SCORES
from csm.posthoc import apply_temperature, fit_temperature

LABELLED = ("accuracy", "ece", "nll", "brier")
SCORE_NAMES = {"max-softmax": "msp"}  # in the names of metrics
KEY = "csm.key"


@dataclass(frozen=True)
class ShiftJob:
    """A classifier and a shift set.

    Attributes:
        run, method, seed: of the classifier.
        directory: of the run: ``model.*``, ``predictions.parquet``; the result goes to ``shift/SHIFT.parquet`` there.
        shift: name of the set.
        parts: part files of the `shift` table, one for each corruption and severity.
        shape: (height, width, channels) of the images.
        n_classes: K.
        n_bins: of the ECE.
        key: identifies all that the result depends on.
    """

    run: str
    method: str
    seed: int
    directory: Path
    shift: str
    parts: tuple[Path, ...]
    shape: tuple[int, int, int]
    n_classes: int
    n_bins: int
    key: str

    @property
    def result(self) -> Path:
        return self.directory / "shift" / f"{self.shift}.parquet"


def is_measured(job: ShiftJob) -> bool:
    """Whether the result is there, whole, of this key."""
    return (tables.metadata(job.result) or {}).get(KEY) == job.key


def measure_shift(job: ShiftJob, device: str = "cpu") -> int:
    """Write the `shift_metrics` rows of ``job`` to ``job.result`` and return their number; done once for a key.

    Parts with labels get ``LABELLED``. Parts without are out of distribution: each measure of ``OOD`` for each score of ``SCORES``, against
    the predictions on the test split. Both without post-hoc calibration and at the temperature of the run, fitted on its validation split.

    Raises:
        InputError: a file is missing, damaged or of another form, labels are not below K, or the logits are not finite; it is named.
    """
    if not is_measured(job):
        inside = tables.read(job.directory / "predictions.parquet", tables.predictions(job.n_classes))
        logits, labels = _logits(inside, "val")
        temperatures = {"none": 1.0, "temperature": fit_temperature(logits, labels)}
        test, _ = _logits(inside, "test")
        classifier = load_classifier(job.directory).to(device)
        rows = [row for part in job.parts for row in _measure(job, part, classifier, test, temperatures, device)]
        tables.write(
            pl.DataFrame(rows, schema=dict(tables.SHIFT_METRICS), orient="row"), job.result, tables.SHIFT_METRICS, {KEY: job.key}
        )
    return len(read_shift_metrics(job))


def read_shift_metrics(job: ShiftJob) -> pl.DataFrame:
    """What ``measure_shift`` wrote."""
    return tables.read(job.result, tables.SHIFT_METRICS)


def _measure(
    job: ShiftJob, part: Path, classifier: Classifier, test: torch.Tensor, temperatures: dict[str, float], device: str
) -> Iterator[tuple[object, ...]]:
    """Rows of one part."""
    logits, about = _predict(job, part, classifier, device)
    corruption, severity = about.row(0, named=True)["corruption"], about.row(0, named=True)["severity"]
    for posthoc, temperature in temperatures.items():
        if about["label"].null_count():
            values = _outside(apply_temperature(test, temperature), apply_temperature(logits, temperature))
        else:
            labels = torch.from_numpy(about["label"].to_numpy().astype(np.int64))
            values = evaluate(logits, labels, temperature, job.n_bins, LABELLED)
        for metric, value in values.items():
            yield job.run, job.method, job.seed, job.shift, corruption, severity, posthoc, metric, value


def _predict(job: ShiftJob, part: Path, classifier: Classifier, device: str) -> tuple[torch.Tensor, pl.DataFrame]:
    """Logits float32 (N, K) of a part, and its rows without images; a row group of images is in memory at a time."""
    about = tables.read(part, tables.SHIFT, [name for name in tables.SHIFT if name != "image"])
    labels = about["label"]
    if about.is_empty() or labels.null_count() not in (0, len(about)) or (labels.max() or 0) >= job.n_classes:  # type: ignore[operator]
        raise InputError(
            f"{part}: expected images with labels in 0..{job.n_classes - 1}, or all without: run csm shift --force shift"
        )
    logits = []
    for start in range(0, len(about), tables.ROW_GROUP):
        images = tables.to_images(tables.read(part, tables.SHIFT, ["image"], (start, tables.ROW_GROUP))["image"], job.shape)
        logits.append(in_batches(lambda batch: classifier(batch.to(device)), images))
    result = torch.cat(logits)
    if not bool(result.isfinite().all()):
        raise InputError(f"{job.directory}: the classifier's logits on {part} are not finite; train it again")
    return result, about


def _outside(inside: torch.Tensor, outside: torch.Tensor) -> dict[str, float]:
    """Every measure for every score, of log-probabilities (N, K)."""
    return {
        f"{name}_{SCORE_NAMES.get(kind, kind)}": measure(score(inside), score(outside)).item()
        for kind, score in SCORES.items()
        for name, measure in OOD.items()
    }


def _logits(predictions: pl.DataFrame, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (N, K) and labels int64 (N,)."""
    rows = predictions.filter(pl.col("split") == split)
    return torch.from_numpy(rows["logits"].to_numpy().copy()), torch.from_numpy(rows["label"].to_numpy().astype(np.int64))
