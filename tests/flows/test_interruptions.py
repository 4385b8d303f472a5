"""The whole pipeline on a tiny configuration, ended before its time: the same command goes on."""

import json
import os
import resource
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

from csm import storage, tables
from csm.generators import load_generator
from csm.mixing import mix
from csm.sampling import SamplerConfig
from tests.flows.outcomes import STAGES, Copy, Run, last_line, mixed_rows

pytestmark = pytest.mark.ray


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
    assert status["FINISHED"] >= len(STAGES) - 4 + 1  # one was killed and three are yet to come; the teacher

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
