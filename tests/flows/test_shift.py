"""The stages shift and evaluate-shift: what is made anew when something changes, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cluster.prediction import Measured
from csm import storage, tables
from csm.classifiers import build_classifier
from csm.datasets import RealDataset
from csm.datasets.shifts import CORRUPTIONS
from csm.errors import InputError
from csm.runs import new_classifier, predictions
from csm.shift_metrics import ShiftJob, is_measured, measure_shift
from flows import evaluate_shift
from flows.artifacts import StageRecord, Workspace
from flows.config import load_config
from flows.evaluate_shift import shift_metrics
from flows.reuse import run_stage, stale
from flows.run import STAGES
from flows.stages import Context, Made
from flows.train import run_specs

PIXEL = "evaluate.shifts.noise={kind: corrupted, parameters: {corruptions: gaussian-noise, severities: '2,4'}}"
PHOTOS = "evaluate.shifts.photos={kind: photographs, parameters: {count: 7}}"
BASE = ("train.compare=[cross-entropy]", "train.seeds=2")
Run = Callable[..., dict[str, bool]]

pytestmark = pytest.mark.usefixtures("one_thread")


class NoTracker:
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **settings: ""


def untrained(context: Context, record: StageRecord) -> Made:
    """In place of the stage train: classifiers with random weights."""
    data = RealDataset.load(context.workspace.root)
    for spec in run_specs(context):
        classifier = new_classifier(spec, data).eval()
        classifier.save(spec.directory)
        tables.write(predictions(spec.run, classifier, data), spec.directory / "predictions.parquet", tables.predictions(10))
        storage.write_json(spec.directory / "run.json", {})
    return Made(2, storage.digest([spec.fingerprint for spec in run_specs(context)]))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """RUN/SHIFT of everything that was measured, in this process."""
    found: list[str] = []

    def measure_shifts(jobs: Sequence[ShiftJob], group: Any, on_measured: Callable[[Measured], None], on_lost: Any) -> None:
        for job in jobs:
            if not is_measured(job):
                found.append(f"{job.run}/{job.shift}")
                measure_shift(job)
                on_measured(Measured(job.run, 1, None))

    monkeypatch.setattr(evaluate_shift, "measure_shifts", measure_shifts)
    return found


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., Context]:
    def make(*overrides: str, forced: tuple[str, ...] = ()) -> Context:
        train = replace(
            STAGES["train"], inputs=("prepare",), settings=lambda config: {"seeds": config.train.seeds}, run=untrained
        )
        config = load_config("digits", [*BASE, *overrides])
        stages = {**STAGES, "train": train}
        return Context(config, Workspace(tmp_path), stages, forced=frozenset(forced), _tracker=NoTracker(), _connected=True)  # type: ignore[arg-type]

    return make


@pytest.fixture
def run(context: Callable[..., Context], measured: list[str]) -> Run:
    """``run(*overrides)`` brings all up to date and gives which stages were reused."""

    def do(*overrides: str, forced: tuple[str, ...] = ()) -> dict[str, bool]:
        measured.clear()
        opened = context(*overrides, forced=forced)
        for name in ("prepare", "shift", "train", "evaluate-shift"):
            run_stage(opened, name)
        return {name: outcome["reused"] for name, outcome in opened.outcomes.items()}

    return do


def times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in (root / "shift").rglob("*") if path.is_file()}


def test_parts_and_metrics_of_every_run_and_set(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL, PHOTOS)
    assert sorted(path.name for path in (tmp_path / "shift" / "noise").iterdir()) == [
        "part-00000000.parquet",
        "part-00000001.parquet",
        "shift.json",
    ]
    data = RealDataset.load(tmp_path)
    for number, severity in enumerate((2, 4)):
        frame = tables.read(tmp_path / "shift" / "noise" / f"part-{number:08d}.parquet", tables.SHIFT)
        assert frame.select("corruption", "severity").unique().rows() == [("gaussian-noise", severity)]
        assert frame["label"].to_list() == data.split("test")[1].tolist()
        off = (tables.to_images(frame["image"], (8, 8, 1)).double() - data.split("test")[0].double()).abs().mean() / 255
        assert 0.01 < off.item() < CORRUPTIONS["gaussian-noise"].levels[severity - 1]
    photos = tables.read(tmp_path / "shift" / "photos" / "part-00000000.parquet", tables.SHIFT)
    assert (
        len(photos) == photos["label"].null_count() == photos["corruption"].null_count() == photos["severity"].null_count() == 7
    )
    assert sorted(measured) == [f"cross-entropy-seed{seed}/{name}" for seed in (0, 1) for name in ("noise", "photos")]
    metrics = tables.read(tmp_path / "shift_metrics.parquet", tables.SHIFT_METRICS)
    assert len(metrics) == 2 * (2 * 2 * 4 + 2 * 6)
    assert metrics.select(pl.struct(pl.exclude("value")).n_unique()).item() == len(metrics)
    assert np.isfinite(metrics["value"].to_numpy()).all()
    assert set(metrics.select("run", "method", "seed").iter_rows()) == {
        (f"cross-entropy-seed{s}", "cross-entropy", s) for s in (0, 1)
    }


def test_nothing_changed_and_all_is_reused(run: Run, measured: list[str]) -> None:
    run(PIXEL)
    assert run(PIXEL) == dict.fromkeys(("prepare", "shift", "train", "evaluate-shift"), True)
    assert measured == []


def test_another_set_leaves_the_first_alone(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL)
    before = times(tmp_path)
    assert run(PIXEL, PHOTOS) == {"prepare": True, "shift": False, "train": True, "evaluate-shift": False}
    assert {name: time for name, time in times(tmp_path).items() if name in before} == before
    assert sorted(measured) == ["cross-entropy-seed0/photos", "cross-entropy-seed1/photos"]


def test_other_settings_replace_the_set_and_its_parts(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL)
    run(PIXEL.replace("'2,4'", "'5'"))
    assert [path.name for path in sorted((tmp_path / "shift" / "noise").glob("part-*"))] == ["part-00000000.parquet"]
    assert len(measured) == 2
    assert tables.read(tmp_path / "shift_metrics.parquet", tables.SHIFT_METRICS)["severity"].unique().to_list() == [5]


def test_more_bins_measure_again_without_making_images(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL)
    before = times(tmp_path)
    assert run(PIXEL, "evaluate.bins=5")["shift"] is True
    assert times(tmp_path) == before
    assert len(measured) == 2


def test_another_seed_of_training_measures_that_run_alone(run: Run, measured: list[str]) -> None:
    run(PIXEL)
    run(PIXEL, "train.seeds=3")
    assert measured == ["cross-entropy-seed2/noise"]


def test_an_interruption_goes_on(
    run: Run, context: Callable[..., Context], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import shift

    write, written = shift.write_part, []

    def interrupted(*arguments: Any) -> str:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(shift, "write_part", interrupted)
    opened = context(PIXEL, PHOTOS)
    run_stage(opened, "prepare")
    with pytest.raises(KeyboardInterrupt):  # between the sets
        run_stage(opened, "shift")
    assert (tmp_path / "shift" / "noise" / "shift.json").is_file()
    assert not (tmp_path / "shift" / "photos" / "shift.json").exists()
    assert stale(opened, "shift") == "was interrupted"
    before = times(tmp_path)
    monkeypatch.setattr(shift, "write_part", write)
    run(PIXEL, PHOTOS)
    assert {name: time for name, time in times(tmp_path).items() if name in before} == before
    assert len(measured) == 4


def test_a_part_that_is_lost_or_cut_short_is_made_again(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL)
    part = tmp_path / "shift" / "noise" / "part-00000001.parquet"
    whole = part.read_bytes()
    for damage in (lambda: part.unlink(), lambda: part.write_bytes(whole[:-40])):
        damage()
        assert run(PIXEL) == {"prepare": True, "shift": False, "train": True, "evaluate-shift": True}
        assert part.read_bytes() == whole
    assert measured == []


def test_a_result_of_a_run_that_is_lost_is_measured_again(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL)
    (tmp_path / "runs" / "cross-entropy-seed1" / "shift" / "noise.parquet").unlink()
    assert run(PIXEL)["evaluate-shift"] is False
    assert measured == ["cross-entropy-seed1/noise"]


def test_force(run: Run, measured: list[str], tmp_path: Path) -> None:
    run(PIXEL)
    before = times(tmp_path)
    run(PIXEL, forced=("shift",))
    assert all(time != before[name] for name, time in times(tmp_path).items())
    assert measured == []  # the same images
    run(PIXEL, forced=("evaluate-shift",))
    assert len(measured) == 2


def test_files_of_a_set_that_change_make_it_again(run: Run, measured: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "cifar-c"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5))
    draw = np.random.default_rng(0)
    np.save(folder / "fog.npy", draw.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
    cifar = f"evaluate.shifts.fog={{kind: cifar-c, parameters: {{path: '{folder}'}}}}"
    run(cifar)
    assert len(tables.read(tmp_path / "shift_metrics.parquet", tables.SHIFT_METRICS)) == 2 * 5 * 2 * 4
    np.save(folder / "fog.npy", draw.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
    assert run(cifar)["shift"] is False
    assert len(measured) == 2


def test_what_a_set_lacks_is_said_before_anything_is_written(context: Callable[..., Context], tmp_path: Path) -> None:
    opened = context("evaluate.shifts.fog={kind: cifar-c, parameters: {path: none}}")
    run_stage(opened, "prepare")
    with pytest.raises(InputError, match=r"^evaluate\.shifts\.fog: path: folder none does not exist$"):
        run_stage(opened, "shift")
    assert not (tmp_path / "shift").exists()


def test_what_only_the_images_tell_is_said_with_the_name_of_the_set(context: Callable[..., Context], tmp_path: Path) -> None:
    opened = context("evaluate.shifts.self={kind: dataset, parameters: {source: digits}}")
    run_stage(opened, "prepare")
    with pytest.raises(InputError, match=r"^evaluate\.shifts\.self: source: 'digits' is the data set itself"):
        run_stage(opened, "shift")
    assert not (tmp_path / "shift" / "self" / "shift.json").exists()


def test_the_table_is_empty_where_no_set_is_configured(tmp_path: Path) -> None:
    (tmp_path / "shift_metrics.parquet").write_bytes(b"of another configuration")
    empty = shift_metrics(Workspace(tmp_path), load_config("digits"))
    assert empty.is_empty()
    assert tables.check(empty, tables.SHIFT_METRICS) is empty


def test_a_damaged_classifier_is_named(run: Run, measured: list[str], context: Callable[..., Context], tmp_path: Path) -> None:
    run(PIXEL)
    run_directory = tmp_path / "runs" / "cross-entropy-seed0"
    (run_directory / "shift" / "noise.parquet").unlink()
    torch.manual_seed(0)
    spec = run_specs(context(PIXEL))[0]
    other = new_classifier(replace(spec, parameters={"width": 4}), RealDataset.load(tmp_path))
    storage.write_tensors(run_directory / "model.safetensors", build_classifier(other.spec).state_dict())
    with pytest.raises(InputError, match=r"model\.safetensors holds the weights of another network"):
        run(PIXEL)
