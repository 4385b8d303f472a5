"""Numbers of a classifier on shift sets, against scikit-learn and sums written out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from csm import tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets.real import RealDataset, build
from csm.errors import InputError
from csm.posthoc import fit_temperature
from csm.runs import predictions
from csm.shift_metrics import ShiftJob, is_measured, measure_shift, read_shift_metrics

CLASSES = ("x", "y", "z")
SHAPE = (6, 6, 1)


def part(path: Path, images: torch.Tensor, labels: torch.Tensor | None, corruption: str | None, severity: int | None) -> Path:
    columns = {
        "image_id": range(len(images)),
        "corruption": [corruption] * len(images),
        "severity": [severity] * len(images),
        "label": [None] * len(images) if labels is None else labels.tolist(),
        "image": tables.from_images(images),
    }
    tables.write(pl.DataFrame(columns, schema=dict(tables.SHIFT)), path, tables.SHIFT)
    return path


@pytest.fixture(scope="module")
def data(separable: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> RealDataset:
    images, labels = separable(40)
    splits = np.array(["train", "val", "test"])[np.arange(120) % 3]
    return build("rows", images.permute(0, 2, 3, 1).numpy(), labels.numpy(), splits, CLASSES)


@pytest.fixture
def job(data: RealDataset, separable: Callable[..., tuple[torch.Tensor, torch.Tensor]], tmp_path: Path) -> ShiftJob:
    """A classifier with random weights on a corruption set of two parts, larger than a row group together with it."""
    info = data.info
    torch.manual_seed(0)
    classifier = build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, CLASSES, info.mean, info.std)).eval()
    run = tmp_path / "runs" / "ce-seed0"
    classifier.save(run)
    tables.write(predictions("ce-seed0", classifier, data), run / "predictions.parquet", tables.predictions(3))
    paths = []
    for severity in (1, 2):
        images, labels = separable(25, seed=severity)
        paths.append(part(tmp_path / f"part-{severity}.parquet", images // severity, labels, "dim", severity))
    return ShiftJob("ce-seed0", "ce", 0, run, "dimmed", tuple(paths), SHAPE, 3, 5, "key")


@pytest.fixture
def outside(job: ShiftJob, tmp_path: Path) -> ShiftJob:
    noise = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (30, 1, 6, 6), dtype=np.uint8))
    return replace(job, shift="noise", parts=(part(tmp_path / "noise.parquet", noise, None, None, None),))


def logits_of(job: ShiftJob, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = pl.read_parquet(job.directory / "predictions.parquet").filter(pl.col("split").cast(pl.String) == split)
    return torch.from_numpy(rows["logits"].to_numpy().copy()), torch.from_numpy(rows["label"].to_numpy().astype(np.int64))


def predict_part(job: ShiftJob, path: Path) -> torch.Tensor:
    from csm.classifiers import load_classifier

    with torch.no_grad():
        return load_classifier(job.directory)(tables.to_images(pl.read_parquet(path)["image"], SHAPE))


def test_corrupted_parts(job: ShiftJob) -> None:
    assert measure_shift(job) == 2 * 2 * 4
    rows = read_shift_metrics(job)
    assert rows["run"].unique().to_list() == ["ce-seed0"]
    assert rows["shift"].unique().to_list() == ["dimmed"]
    temperature = fit_temperature(*logits_of(job, "val"))
    assert temperature != 1.0
    for severity, path in enumerate(job.parts, start=1):
        labels = pl.read_parquet(path)["label"].to_numpy()
        for posthoc, scale in (("none", 1.0), ("temperature", temperature)):
            probs = (predict_part(job, path).double() / scale).softmax(dim=1).numpy()
            confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
            bins = np.clip(np.ceil(confidence * 5).astype(int) - 1, 0, 4)
            gaps = [abs((correct[bins == b] - confidence[bins == b]).sum()) for b in range(5)]
            wanted = {
                "accuracy": correct.mean(),
                "ece": sum(gaps) / len(labels),
                "nll": log_loss(labels, probs, labels=[0, 1, 2]),
                "brier": np.square(probs - np.eye(3)[labels]).sum(axis=1).mean(),
            }
            got = rows.filter((pl.col("severity") == severity) & (pl.col("posthoc") == posthoc) & (pl.col("corruption") == "dim"))
            assert dict(got.select("metric", "value").iter_rows()) == pytest.approx(wanted, abs=1e-9)


def test_outside_is_told_from_the_test_split(outside: ShiftJob) -> None:
    assert measure_shift(outside) == 2 * 2 * 3
    rows = read_shift_metrics(outside)
    assert rows["corruption"].null_count() == rows["severity"].null_count() == len(rows)
    temperature = fit_temperature(*logits_of(outside, "val"))
    test, _ = logits_of(outside, "test")
    is_inside = np.r_[np.ones(len(test)), np.zeros(30)]
    for posthoc, scale in (("none", 1.0), ("temperature", temperature)):
        both = torch.cat([test, predict_part(outside, outside.parts[0])]).double() / scale
        probs = both.softmax(dim=1).numpy()
        got = dict(rows.filter(pl.col("posthoc") == posthoc).select("metric", "value").iter_rows())
        for name, scores in (("msp", probs.max(axis=1)), ("entropy", (probs * np.log(probs)).sum(axis=1))):
            threshold = np.sort(scores[: len(test)])[::-1][int(np.ceil(0.95 * len(test))) - 1]
            assert got.pop(f"auroc_{name}") == pytest.approx(roc_auc_score(is_inside, scores), abs=1e-9)
            assert got.pop(f"aupr_{name}") == pytest.approx(average_precision_score(is_inside, scores), abs=1e-9)
            assert got.pop(f"fpr95_{name}") == pytest.approx((scores[len(test) :] >= threshold).mean(), abs=1e-9)
        assert not got


def test_a_part_is_read_in_row_groups_with_the_same_result(job: ShiftJob, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_shift(job)
    whole = read_shift_metrics(job)
    job.result.unlink()
    decoded = []
    to_images = tables.to_images
    monkeypatch.setattr(tables, "ROW_GROUP", 20)
    monkeypatch.setattr(tables, "to_images", lambda column, shape: decoded.append(len(column)) or to_images(column, shape))
    measure_shift(job)
    assert decoded == [20, 20, 20, 15] * 2
    pieces = read_shift_metrics(job)
    assert pieces.drop("value").equals(whole.drop("value"))
    assert pieces["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), abs=1e-6)


def test_done_once_for_a_key(job: ShiftJob) -> None:
    assert not is_measured(job)
    measure_shift(job)
    assert is_measured(job)
    before = job.result.stat().st_mtime_ns
    job.parts[0].unlink()  # nothing is read again
    measure_shift(job)
    assert job.result.stat().st_mtime_ns == before
    assert not is_measured(replace(job, key="other"))
    job.result.write_bytes(job.result.read_bytes()[:-30])
    assert not is_measured(job)
    assert not list(job.result.parent.glob(".*"))


def test_what_cannot_be_used_is_named(job: ShiftJob, tmp_path: Path) -> None:
    images = torch.zeros(4, 1, 6, 6, dtype=torch.uint8)
    bad = replace(job, parts=(part(tmp_path / "bad.parquet", images, torch.tensor([0, 1, 2, 3]), "dim", 1),))
    with pytest.raises(InputError, match=r"bad\.parquet: expected images with labels in 0\.\.2, or all without"):
        measure_shift(bad)
    bad = replace(job, parts=(part(tmp_path / "bad.parquet", images[:, :, :5], torch.tensor([0, 1, 2, 2]), "dim", 1),))
    with pytest.raises(InputError, match="image bytes: expected 36 per image"):
        measure_shift(bad)
    bad = replace(job, parts=(part(tmp_path / "bad.parquet", images[:0], torch.zeros(0, dtype=torch.int64), "dim", 1),))
    with pytest.raises(InputError, match=r"bad\.parquet: expected images"):
        measure_shift(bad)
    with pytest.raises(InputError, match=r"none\.parquet does not exist"):
        measure_shift(replace(job, parts=(tmp_path / "none.parquet",)))
    assert not job.result.exists()


def test_logits_that_are_not_finite_are_said(job: ShiftJob) -> None:
    from csm.classifiers import load_classifier

    broken = load_classifier(job.directory)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    broken.save(job.directory)
    with pytest.raises(InputError, match=r"ce-seed0: the classifier's logits on .* are not finite; train it again"):
        measure_shift(job)
