"""The whole pipeline on a tiny configuration: contract of `csm run`, reuse, and going on after a kill."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml

from csm import storage, tables
from csm.generators import load_generator
from csm.metrics import METRICS
from csm.mixing import mix
from csm.sampling import SamplerConfig

Run = Callable[..., subprocess.CompletedProcess[str]]
Copy = Callable[..., Path]
STAGES = [
    "prepare",
    "generator",
    "fit-teacher",
    "fit-annotators",
    "plan",
    "mix",
    "annotate",
    "train",
    "model",
    "evaluate",
    "report",
]

pytestmark = pytest.mark.ray


def mixed_rows(workspace: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((workspace / "mixed").glob("*.parquet"))).sort("mix_id")


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
@pytest.mark.timeout(900)
def test_mixing_goes_on_after_kill_9_with_the_same_images(finished: Any, csm: Run, processes: Any, copy: Copy) -> None:
    """Killed after its first part file, with all its processes; then the same command.

    Two oracles: an undisturbed run in another workspace, and the direct call of csm on each shard, with one thread as in the actors.
    """
    options = ["--config", str(finished.config), "--set", "plan.sets_per_pair=80"]
    workspaces = [copy("mixed", "annotations", "runs"), copy("mixed", "annotations", "runs")]
    for workspace in workspaces:
        assert csm("plan", *options, "--workspace", workspace).returncode == 0
    workspace, undisturbed = workspaces
    mixed = workspace / "mixed"
    with started("mix", *options, "--workspace", workspace, processes=processes) as victim:
        victim.wait_for(lambda: any(mixed.glob("part-*.parquet")))
        family = victim.kill()
        assert victim.process.wait() == -signal.SIGKILL
    assert processes.left(family, 15) == []
    plan = pl.read_parquet(workspace / "plan.parquet")
    before = {path: path.stat().st_mtime_ns for path in mixed.glob("part-*.parquet")}
    assert 0 < len(before) < plan["shard"].n_unique()

    again = csm("mix", *options, "--workspace", workspace, "--json")
    assert again.returncode == 0, again.stderr
    assert "mix: going on" in again.stderr
    assert last_line(again)["stages"] == {"mix": {**last_line(again)["stages"]["mix"], "reused": False, "rows": len(plan)}}
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was whole was not made again
    assert not list(mixed.glob(".*"))
    assert mixed_rows(workspace)["mix_id"].equals(plan["mix_id"].sort())
    assert mixed_rows(workspace).equals(direct_call(workspace, plan))

    assert csm("mix", *options, "--workspace", undisturbed).returncode == 0
    for path in mixed.iterdir():
        assert path.read_bytes() == (undisturbed / "mixed" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_is_full_is_one_line_and_the_same_command_goes_on(
    finished: Any, csm: Run, processes: Any, copy: Copy
) -> None:
    """No byte more can be written (a limit on the size of files, which needs no mount) by the actors, or by the command either."""
    options = ["--config", str(finished.config), "--set", "plan.sets_per_pair=80"]
    workspace = copy("mixed", "annotations", "runs", "receipts.jsonl")
    assert csm("plan", *options, "--workspace", workspace).returncode == 0
    mixed = workspace / "mixed"

    def fill(with_driver: bool) -> str:
        before = len(list(mixed.glob("part-*")))
        with started("mix", *options, "--workspace", workspace, processes=processes) as process:
            process.wait_for(lambda: len(list(mixed.glob("part-*"))) > before)
            writers = [pid for pid in processes.descendants(process.process.pid) if "MapWorker" in processes.name(pid)]
            for pid in [*writers, process.process.pid] if with_driver else writers:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            out, err = process.process.communicate(timeout=200)
        assert (process.process.returncode, out) == (2, ""), err
        assert "Traceback" not in err
        return err.splitlines()[-1]

    line = fill(with_driver=False)
    assert line.startswith((f"csm: {mixed}/part-", f"csm: {workspace}/annotations/"))
    assert line.endswith(": File too large; free space or change permissions, then run the same command again to go on")
    assert fill(with_driver=True).endswith("; free space or change permissions, then run the same command again to go on")
    plan = pl.read_parquet(workspace / "plan.parquet")
    assert not list(mixed.glob(".*"))
    whole = {path: path.read_bytes() for path in mixed.iterdir()}
    assert 2 <= len(whole) < plan["shard"].n_unique()
    assert all(tables.metadata(path) for path in whole)

    again = csm("mix", *options, "--workspace", workspace)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in whole} == whole
    assert mixed_rows(workspace).equals(direct_call(workspace, plan))
    lines = [json.loads(line) for line in (workspace / "receipts.jsonl").read_text().splitlines()]
    receipts = {mixed / f"part-{line['shard']:08d}.parquet": line["checksum"] for line in lines if line["part"] == "mixed"}
    assert set(mixed.iterdir()) - set(whole) <= set(receipts)
    assert all(storage.file_digest(path) == checksum for path, checksum in receipts.items())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ctrl_c_at_any_stage_and_the_same_command_goes_on(
    csm: Run, processes: Any, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(
        generator={"steps": 60, "checkpoint_steps": 10}, plan={"sets_per_pair": 60}, train={"optimizer": {"epochs": 6}}
    )
    workspace = tmp_path / "workspace"
    command = ["run", "--config", str(config), "--workspace", str(workspace), "--json"]

    def interrupt(stage: str, reached: Callable[[], bool]) -> str:
        """Press Ctrl-C, which a terminal sends to the whole group, once ``reached``; what the command then says."""
        with started(*command, processes=processes) as process:
            process.wait_for(reached)
            family = processes.descendants(process.process.pid)
            os.killpg(process.process.pid, signal.SIGINT)
            out, err = process.process.communicate(timeout=60)
        assert process.process.returncode == 130, err
        assert out == ""
        assert err.splitlines()[-1] == "csm: interrupted; run the same command again to go on"
        assert "Traceback" not in err
        assert processes.left(family, 20) == []
        record = json.loads((workspace / "stages" / f"{stage}.json").read_text())
        assert record["done"] is False
        return err

    state = workspace / "generator" / "state.pt"
    interrupt("generator", state.is_file)
    assert torch.load(state, weights_only=True)["training"]["step"] >= 10
    interrupt("mix", lambda: len(list((workspace / "mixed").glob("part-*.parquet"))) > 2)
    kept = {path: path.stat().st_mtime_ns for path in (workspace / "mixed").glob("part-*.parquet")}
    interrupt("train", lambda: any((workspace / "runs").glob("*/run.json")))
    trained = {path: path.stat().st_mtime_ns for path in (workspace / "runs").glob("*/run.json")}
    status = status_of(workspace)
    assert set(status) == {
        "KILLED",
        "FINISHED",
    }  # killed: the run itself, the stage, and the classifiers that were not logged yet
    assert status["FINISHED"] >= len(STAGES) - 3 + 1  # of 10 stages 2 are yet to come; the teacher

    done = csm(*command)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    plan = pl.read_parquet(workspace / "plan.parquet")
    assert mixed_rows(workspace)["mix_id"].equals(plan["mix_id"].sort())
    assert [path for path in workspace.rglob(".*") if path.name != ".lock" and path.parent.name in ("mixed", "generator")] == []
    assert status_of(workspace) == {"FINISHED": len(STAGES) + 4}
    with sqlite3.connect(workspace / "mlflow.db") as store:
        assert store.execute("select count(*), count(distinct name) from runs").fetchone() == (len(STAGES) + 4,) * 2
        twice = "select run_uuid, key, step from metrics where key like '%loss%' group by run_uuid, key, step having count(*) > 1"
        assert store.execute(twice).fetchall() == []
        steps = "select step from metrics join runs using (run_uuid) where name = ? and key = 'loss' order by step"
        assert store.execute(steps, ("generator",)).fetchall() == [(step,) for step in range(10, 61, 10)]
        for run in ("teacher-00", "cross-entropy-seed0", "csm-seed0"):
            assert store.execute(steps, (run,)).fetchall() == [(epoch,) for epoch in range(1, 7)]


class Started:
    """A command that runs beside the test."""

    def __init__(self, arguments: Sequence[Any], processes: Any) -> None:
        self.processes = processes
        program = [str(Path(sys.executable).with_name("csm")), *map(str, arguments)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def wait_for(self, reached: Callable[[], bool], seconds: float = 280) -> None:
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, "it was not reached in time"
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.01)

    def kill(self) -> list[int]:
        """SIGKILL to it and to everything it started; their ids."""
        family = [self.process.pid, *self.processes.descendants(self.process.pid)]
        self.processes.kill(family)
        return family


@contextmanager
def started(*arguments: Any, processes: Any) -> Iterator[Started]:
    """Run `csm` with ``arguments`` for the length of the block; nothing of it outlives the block."""
    process = Started(arguments, processes)
    try:
        yield process
    finally:
        process.kill()
        process.process.communicate()


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Copy:
    """``copy(*without)`` copies the finished workspace, without the MLflow store, which names its folder, and without ``without``."""

    def make(*without: str) -> Path:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(
            finished.root, target, ignore=shutil.ignore_patterns("mlflow.db", "tracking.json", "mlartifacts", *without)
        )
        return target

    return make


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return dict(json.loads(done.stdout.splitlines()[-1]))


def status_of(workspace: Path) -> dict[str, int]:
    """How many MLflow runs have each status, the parent included."""
    with sqlite3.connect(workspace / "mlflow.db") as store:
        return dict(store.execute("select status, count(*) from runs group by status"))


def direct_call(workspace: Path, plan: pl.DataFrame) -> pl.DataFrame:
    """What csm gives for every shard of ``plan`` without Ray."""
    generator = load_generator(workspace / "generator")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shards = plan.partition_by("shard", maintain_order=True)
        parts = [mix(rows, generator, (8, 8, 1), SamplerConfig(steps=2), batch_size=4) for rows in shards]
    finally:
        torch.set_num_threads(threads)
    return pl.concat(parts).sort("mix_id")


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
