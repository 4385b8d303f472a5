"""Sweeps as a user runs them, in workspaces that already hold the tiny configuration's images."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import yaml

from csm import storage
from tests.conftest import CSM

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SPACE = {
    "train.optimizer.learning_rate": {"low": 0.01, "high": 0.1, "log": True},
    "method.mixed.annotator": ["teacher", "lda"],
    "method.mixed.sets": [1, 4],
}
TINY_METHOD = {"mixed": {"annotator": "teacher", "schedule": "interior"}}
METHODS = {"seeds": 1, "compare": ["cross-entropy", "csm"], "methods": {"csm": TINY_METHOD}, "optimizer": {"epochs": 2}}


class Sweep(NamedTuple):
    root: Path
    config: Path
    csm: Any

    def run(self, *settings: str) -> subprocess.CompletedProcess[str]:
        return self.csm(*self.command(*settings), timeout=800)

    def command(self, *settings: str) -> list[str]:
        sets = [item if item.startswith("--") else f"--set={item}" for item in settings]
        return ["tune", "--config", str(self.config), "--workspace", str(self.root), "--json", *sets]

    def trials(self) -> list[dict[str, Any]]:
        return [storage.read_json(path) for path in sorted(self.root.glob("tune/trials/*/trial.json"))]

    def models(self) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in self.root.glob("tune/trials/*/*/model.safetensors")}

    def params(self, kind: str) -> dict[str, str]:
        """Parameters of the one run of ``kind`` in MLflow."""
        query = (
            "select params.key, params.value from params join tags on tags.run_uuid = params.run_uuid where tags.key = 'csm.kind'"
        )
        with sqlite3.connect(self.root / "mlflow.db") as store:
            return dict(store.execute(f"{query} and tags.value = ?", (kind,)))

    def runs(self) -> list[str]:
        """Names of the trials in MLflow."""
        query = "select name from runs join tags on tags.run_uuid = runs.run_uuid where tags.key = 'csm.kind' and tags.value = 'trial'"
        with sqlite3.connect(self.root / "mlflow.db") as store:
            return sorted(name for (name,) in store.execute(query))


@pytest.fixture
def sweep(finished, write_config, csm, tmp_path):
    """``sweep(space, **tune)``: a sweep in a copy of the workspace."""

    def make(space: dict[str, Any] = SPACE, train: dict[str, Any] | None = None, **tune: Any) -> Sweep:
        config = write_config(train={**METHODS, **(train or {})}, tune={"space": space, "trials": 3, **tune})
        shutil.copytree(finished.root, tmp_path / "workspace")
        return Sweep(tmp_path / "workspace", config, csm)

    return make


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_sweep_its_result_and_its_best_configuration(sweep, csm, tmp_path):
    made = sweep(seeds=2)
    first = result(made.run())
    assert set(first) == {"trials", "failed", "best", "best_yaml", "sweep", "model", "seconds"}
    assert (first["trials"], first["failed"]) == (3, 0)
    frame = pl.read_parquet(first["sweep"])
    best = frame.filter(rank=1).row(0, named=True)
    assert best["trial"] == first["best"]["trial"]
    assert best["val.nll"] == frame["val.nll"].min() == first["best"]["val_nll"]
    assert (
        frame.filter(pl.col("test.nll").is_not_null())["trial"].to_list()
        == frame.filter(pl.col("pareto") | (pl.col("rank") == 1))["trial"].to_list()
    )
    assert frame["run"].n_unique() == 3
    assert made.runs() == ["trial-0", "trial-1", "trial-2"]
    assert {path.name for path in made.root.glob("tune/plots/*")} == {"history.png", "pareto.png", "slices.png"}

    before = made.models()
    again = result(made.run())
    assert made.models() == before
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    more = result(made.run("tune.trials=4"))
    assert more["trials"] == 4
    assert {path: stamp for path, stamp in made.models().items() if path in before} == before
    assert made.runs() == ["trial-0", "trial-1", "trial-2", "trial-3"]

    refused = made.run("tune.seeds=1")
    assert refused.returncode == 2
    assert "holds trials of another sweep (tune.seeds 2 -> 1)" in refused.stderr.splitlines()[-1]

    repeated = csm("run", "--config", more["best_yaml"], "--workspace", tmp_path / "again", "--set", "train.seeds=2")
    assert repeated.returncode == 0, repeated.stderr
    for seed in (0, 1):
        trial = made.root / "tune" / "trials" / f"{more['best']['trial']:04d}" / f"seed{seed}" / "model.safetensors"
        assert (tmp_path / "again" / "runs" / f"csm-seed{seed}" / "model.safetensors").read_bytes() == trial.read_bytes()


@pytest.mark.slow
def test_a_killed_sweep_goes_on(sweep):
    made = sweep(train={"optimizer": {"epochs": 20}}, trials=4)
    driver = subprocess.Popen([CSM, *made.command()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while [trial["status"] for trial in made.trials()] != ["done", "done", "running"] and time.monotonic() < end:
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = made.models()
    assert len(before) >= 2
    assert result(made.run())["trials"] == 4
    assert made.runs() == [f"trial-{number}" for number in range(4)]
    assert {"tune.trials": "4", "tune.search": "tpe"}.items() <= made.params("sweep").items()
    assert {path: stamp for path, stamp in made.models().items() if path in before} == before


@pytest.mark.slow
def test_a_trial_that_fails_is_recorded_and_leaves_the_others_alone(sweep):
    made = sweep(
        {"train.optimizer.learning_rate": [1.0e30, 0.02]}, search="grid", train={"optimizer": {"epochs": 2, "clip": 0.0}}
    )
    found = result(made.run())
    assert (found["trials"], found["failed"]) == (2, 1)
    frame = pl.read_parquet(found["sweep"]).sort("param.train.optimizer.learning_rate")
    assert frame["status"].to_list() == ["done", "failed"]
    assert frame["error"][1].startswith("FloatingPointError: training: loss is")


@pytest.mark.slow
def test_no_trial_that_comes_to_its_end_is_one_line_and_exit_2(sweep):
    made = sweep({"train.optimizer.learning_rate": [1.0e30]}, search="grid", train={"optimizer": {"epochs": 2, "clip": 0.0}})
    for _ in range(2):  # the second time nothing is trained
        done = made.run()
        assert done.returncode == 2
        assert "none of 1 trials came to its end (trial 0: FloatingPointError" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_halving_two_objectives_and_images_of_their_own(sweep):
    space = {"plan.sets_per_pair": [4, 2], "train.optimizer.learning_rate": [1.0e-7, 0.05]}
    made = sweep(
        space, search="grid", trials=9, objectives=["accuracy", "ece"], train={"optimizer": {"epochs": 4}},
        scheduler={"kind": "asha", "grace": 1, "reduction": 2},
    )  # fmt: skip
    found = result(made.run())
    frame = pl.read_parquet(found["sweep"])
    assert found["trials"] == len(frame) == 4
    assert "stopped" in frame["status"].to_list()
    assert frame.filter(rank=1)["param.train.optimizer.learning_rate"].item() == 0.05
    inputs = sorted(path for path in made.root.glob("tune/inputs/*") if path.is_dir())
    assert {len(pl.read_parquet(path / "plan.parquet")) for path in inputs} == {12, 24}
    part = next(iter(sorted(made.root.glob("mixed/part-*"))))
    linked = [path for path in inputs if (path / "mixed" / part.name).stat().st_ino == part.stat().st_ino]
    assert len(linked) == 1  # that of four sets, as in the workspace
    generators = {(path / "generator" / "model.safetensors").stat().st_ino for path in inputs}
    assert generators == {(made.root / "generator" / "model.safetensors").stat().st_ino}
    assert (
        yaml.safe_load(Path(found["best_yaml"]).read_text())["plan"]["sets_per_pair"]
        == found["best"]["values"]["plan.sets_per_pair"]
    )
    before = made.models()
    assert result(made.run("tune.trials=8"))["trials"] == 4  # the grid has no more
    assert made.models() == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tune.space.nope.x=[1]", "tune.space.nope.x: cannot be tried"),
        ("tune.space.generator.steps={low: 3, high: 6}", "tune.space.generator.steps: every value needs images"),
        ("tune.space=null", "tune.space: empty"),
        ("tune.method=cross-entropy", "tune.space.method.mixed.sets: cross-entropy trains on no mixed images"),
        ("tune.objectives=[f1]", "tune.objectives: unknown 'f1'"),
        ("tune.scheduler.kind=pbt", "tune.space.method.mixed.annotator: pbt changes trainings that run"),
    ],
)
def test_what_cannot_be_tried_is_one_line_and_leaves_nothing(refused, write_config, tmp_path, setting, message):
    config = write_config(train=METHODS, tune={"space": SPACE})
    assert message in refused("tune", "--config", config, "--workspace", tmp_path / "w", "--set", setting)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_population_goes_on_from_its_best_and_only_once(sweep):
    space = {"train.optimizer.learning_rate": [1.0e-6, 0.02, 0.05], "method.mixed.weight": [0.5]}
    made = sweep(space, search="grid", concurrent=1, train={"optimizer": {"epochs": 4}}, scheduler={"kind": "pbt", "interval": 1})
    first = result(made.run())
    assert (first["trials"], first["failed"]) == (3, 0)
    taken = [trial for trial in made.trials() if trial["last"]]
    assert taken
    assert all(trial["last"] != trial["values"] for trial in taken)
    before = made.models()
    assert result(made.run("tune.trials=9"))["best"] == first["best"]  # the grid has no more
    assert made.models() == before
