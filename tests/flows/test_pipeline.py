"""The whole pipeline on a tiny configuration: contract of `csm run` and reuse."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from csm import tables
from csm.metrics import METRICS
from tests.flows.outcomes import STAGES, Copy, Run, last_line, mixed_rows

pytestmark = pytest.mark.ray


def mlflow_runs(workspace: Path) -> int:
    with sqlite3.connect(workspace / "mlflow.db") as store:
        return int(store.execute("select count(*) from runs").fetchone()[0])


def test_the_json_line_keeps_its_contract(finished: Any) -> None:
    result = finished.result
    assert {"workspace", "report", "metrics", "seconds", "stages"} <= set(result)
    assert Path(result["report"]).is_file()
    assert Path(result["metrics"]).is_file()
    assert list(result["stages"]) == STAGES
    assert {name: result["stages"][name]["workers_lost"] for name in ("fit-annotators", "mix")} == {"fit-annotators": 0, "mix": 0}
    for outcome in result["stages"].values():
        assert {"seconds", "reused", "rows"} <= set(outcome)
        assert outcome["reused"] is False
        assert outcome["rows"] > 0


def test_metrics_hold_every_method_seed_and_metric_at_both_temperatures(finished: Any) -> None:
    metrics = pl.read_parquet(finished.result["metrics"]).filter(pl.col("split").cast(pl.String) == "test")
    keys = set(metrics.select("method", "seed", "posthoc", "metric").iter_rows())
    assert keys == {(m, 0, p, n) for m in ("cross-entropy", "csm") for p in ("none", "temperature") for n in METRICS}
    assert len(metrics) == len(keys)
    assert (metrics.filter(posthoc="none")["temperature"] == 1.0).all()
    assert metrics.filter(posthoc="temperature").group_by("run").agg(pl.col("temperature").n_unique())[
        "temperature"
    ].to_list() == [1, 1]


def test_every_planned_image_is_mixed_and_annotated_once(finished: Any) -> None:
    planned = pl.read_parquet(finished.root / "plan.parquet")["mix_id"].sort()
    assert mixed_rows(finished.root)["mix_id"].equals(planned)
    for name in ("projection", "teacher"):
        parts = sorted((finished.root / "annotations" / name).glob("*.parquet"))
        assert pl.read_parquet(parts)["mix_id"].sort().equals(planned)


def test_a_second_run_reuses_everything_and_adds_no_mlflow_run(finished: Any, csm: Run) -> None:
    before = mlflow_runs(finished.root)
    done = csm(*finished.command)
    assert done.returncode == 0, done.stderr
    assert "ray:" not in done.stderr
    assert mlflow_runs(finished.root) == before
    lines = [line for line in done.stderr.splitlines() if line.split(":")[0] in STAGES]
    assert len(lines) == len(STAGES)
    assert all("reused" in line for line in lines)


def test_tracking_has_one_parent_and_a_child_for_each_stage_and_classifier(finished: Any) -> None:
    with sqlite3.connect(finished.root / "mlflow.db") as store:
        names = sorted(name for (name,) in store.execute("select name from runs"))
        parents = store.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
        unfinished = store.execute("select count(*) from runs where status != 'FINISHED'").fetchone()[0]
    assert names == sorted([*STAGES, "tiny", "teacher-00", "cross-entropy-seed0", "csm-seed0"])
    assert parents == len(names) - 1
    assert unfinished == 0


@pytest.mark.slow
def test_more_epochs_train_again_but_mix_nothing_again(
    finished: Any, csm: Run, write_config: Callable[..., Path], copy: Copy
) -> None:
    workspace = copy()
    before = {path.name: path.stat().st_mtime_ns for path in (workspace / "mixed").iterdir()}
    config = write_config(train={"optimizer": {"epochs": 3}})
    done = csm("run", "--config", config, "--workspace", workspace, "--json")
    assert done.returncode == 0, done.stderr
    reused = {name: stage["reused"] for name, stage in last_line(done)["stages"].items()}
    # the teacher is a classifier too, so the images are annotated anew, but they are the same images
    assert [name for name in STAGES if reused[name]] == ["prepare", "generator", "plan", "mix"]
    assert {path.name: path.stat().st_mtime_ns for path in (workspace / "mixed").iterdir()} == before
    for run in ("cross-entropy-seed0", "csm-seed0"):
        assert len(json.loads((workspace / "runs" / run / "history.json").read_text())) == 3
    assert yaml.safe_load((workspace / "config.yaml").read_text())["train"]["optimizer"]["epochs"] == 3


@pytest.mark.slow
def test_a_part_that_is_deleted_or_cut_short_is_made_again_and_no_other(finished: Any, csm: Run, copy: Copy) -> None:
    workspace = copy()
    parts = sorted((workspace / "mixed").iterdir()) + sorted((workspace / "annotations" / "teacher").iterdir())
    whole = {path: path.read_bytes() for path in parts}
    parts[0].unlink()
    parts[2].write_bytes(whole[parts[2]][:-100])
    parts[-1].write_bytes(whole[parts[-1]][:50])
    left = workspace / "mixed" / ".part-00000000.parquet.1.tmp"  # as a writer leaves it that was killed
    left.write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in parts if path.exists()}
    done = csm("run", "--config", finished.config, "--workspace", workspace, "--json")
    assert done.returncode == 0, done.stderr
    reused = {name: stage["reused"] for name, stage in last_line(done)["stages"].items()}
    assert [name for name in STAGES if not reused[name]] == ["mix", "annotate"]
    assert {path: path.read_bytes() for path in parts} == whole
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {parts[2], parts[-1]}
    assert not left.exists()


@pytest.mark.slow
def test_shift_sets_are_made_and_measured_by_evaluate_and_leave_the_classifiers_alone(
    finished: Any, csm: Run, write_config: Callable[..., Path], copy: Copy
) -> None:
    workspace = copy()
    shifts = {
        "noise": {"kind": "corrupted", "parameters": {"corruptions": "gaussian-noise", "severities": "1,5"}},
        "photographs": {"kind": "photographs", "parameters": {"count": 40}},
    }
    config = write_config(evaluate={"shifts": shifts})
    trained = {path: path.stat().st_mtime_ns for path in (workspace / "runs").glob("*/run.json")}
    command = ["evaluate", "--config", config, "--workspace", workspace, "--json"]
    done = csm(*command)
    assert done.returncode == 0, done.stderr
    assert list(last_line(done)["stages"]) == ["shift", "evaluate-shift", "evaluate"]
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    metrics = tables.read(workspace / "shift_metrics.parquet", tables.SHIFT_METRICS)
    assert set(metrics["method"]) == {"cross-entropy", "csm"}
    assert len(metrics) == 2 * 2 * (2 * 4 + 6)
    again = last_line(csm(*command))["stages"]
    assert again["shift"]["reused"]
    assert again["evaluate-shift"]["reused"]
