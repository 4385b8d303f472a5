"""The oracle: what a task measures equals a direct `csm.shift_metrics.measure_shift`, bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.prediction import Measured, measure_shifts
from cluster.resources import Group
from csm import tables
from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets import load_dataset
from csm.datasets.shifts import ShiftConfig, shift_parts
from csm.errors import InputError
from csm.runs import predictions
from csm.shift_metrics import ShiftJob, is_measured, measure_shift, read_shift_metrics
from flows.shift import part_frame

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session", "one_thread")]

SHIFTS = {
    "corrupted": ShiftConfig("corrupted", {"corruptions": "gaussian-noise", "severities": "1,5"}),
    "photographs": ShiftConfig("photographs", {"count": 50}),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> list[ShiftJob]:
    """Two classifiers with random weights on two sets."""
    root = tmp_path_factory.mktemp("prediction")
    data = load_dataset("digits")
    parts: dict[str, list[Path]] = {name: [] for name in SHIFTS}
    for name, config in SHIFTS.items():
        for part in shift_parts(config, data):
            parts[name].append(root / name / f"part-{len(parts[name])}.parquet")
            tables.write(part_frame(part), parts[name][-1], tables.SHIFT)
    jobs = []
    for seed in range(2):
        torch.manual_seed(seed)
        spec = ClassifierSpec("small-cnn", {"width": 4}, 1, data.info.class_names, data.info.mean, data.info.std)
        classifier, run = build_classifier(spec).eval(), root / "runs" / f"ce-seed{seed}"
        classifier.save(run)
        tables.write(predictions(run.name, classifier, data), run / "predictions.parquet", tables.predictions(10))
        jobs += [ShiftJob(run.name, "ce", seed, run, name, tuple(parts[name]), (8, 8, 1), 10, 15, "key") for name in SHIFTS]
    return jobs


def elsewhere(jobs: list[ShiftJob], root: Path) -> list[ShiftJob]:
    """The same, with copies of the classifiers that were not measured."""
    for job in jobs:
        shutil.copytree(job.directory, root / job.run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("shift"))
    return [replace(job, directory=root / job.run) for job in jobs]


def test_tasks_equal_direct_calls_and_are_done_once(jobs: list[ShiftJob], tmp_path: Path) -> None:
    heard: list[Measured] = []
    spread = elsewhere(jobs, tmp_path / "spread")
    measure_shifts(spread, Group(), heard.append, pytest.fail)
    assert sorted(heard) == [Measured("ce-seed0", 2, None), Measured("ce-seed1", 2, None)]
    for job, direct in zip(spread, elsewhere(jobs, tmp_path / "direct"), strict=True):
        measure_shift(direct)
        assert read_shift_metrics(job).equals(read_shift_metrics(direct))
        assert np.isfinite(read_shift_metrics(job)["value"].to_numpy()).all()
    times = [job.result.stat().st_mtime_ns for job in spread]
    measure_shifts(spread, Group(), pytest.fail, pytest.fail)  # all is done: no task, and nobody is told
    assert [job.result.stat().st_mtime_ns for job in spread] == times
    spread[2].result.unlink()  # as an interruption leaves it
    measure_shifts(spread, Group(workers=1), heard.append, pytest.fail)
    assert heard[2:] == [Measured("ce-seed1", 1, None)]
    assert [job.result.stat().st_mtime_ns == time for job, time in zip(spread, times, strict=True)] == [True, True, False, True]


def test_a_classifier_that_cannot_be_used_is_named_and_the_others_are_measured(jobs: list[ShiftJob], tmp_path: Path) -> None:
    spread = elsewhere(jobs, tmp_path)
    weights = tmp_path / "ce-seed0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    heard: list[Measured] = []
    with pytest.raises(InputError, match=r"ce-seed0/model\.safetensors is not a whole safetensors file") as caught:
        measure_shifts(spread, Group(workers=1), heard.append, pytest.fail)
    assert "\n" not in str(caught.value)
    assert heard == [Measured("ce-seed1", 2, None)]
    assert [is_measured(job) for job in spread] == [False, False, True, True]


def test_tasks_that_do_not_fit_are_refused(jobs: list[ShiftJob], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"resources\.train: 9 workers .* do not fit the cluster's 2 CPU"):
        measure_shifts(elsewhere(jobs, tmp_path), Group(workers=9), pytest.fail, pytest.fail)
