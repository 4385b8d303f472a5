"""The oracle: a run trained by two workers equals a direct `csm.runs.fit_run` up to rounding, for a network without BatchNorm."""

import json
import os
import signal
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cluster import groups
from cluster.resources import Group
from cluster.training import RunEvent, fit_many
from csm import storage, tables
from csm.datasets.real import build
from csm.errors import InputError
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec, fit_run, is_finished

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session", "one_thread")]

ROWS = 60  # 36 of them to train on
VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
OPTIMIZER = OptimizerConfig(epochs=4, batch_size=12, learning_rate=0.02, shift=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a data set of 60 grey images, 8 by 8, of 2 classes, in row groups of 10."""
    draw = np.random.default_rng(1)
    labels = np.arange(ROWS) % 2
    images = (draw.integers(0, 100, (ROWS, 8, 8, 1)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    folder = tmp_path_factory.mktemp("data")
    build("noise", images, labels, np.array(["train", "val", "train", "test", "train"] * 12), ["a", "b"]).save(folder)
    part = folder / "real" / "part-00000.parquet"
    tables.read(part, tables.REAL).write_parquet(part, row_group_size=10)
    return folder


def run(data: Path, root: Path, name: str, **extra) -> RunSpec:
    plain = RunSpec(
        run=name, method=name, seed=0, directory=root / name, data=data, network="small-cnn", parameters={"width": 4},
        settings=Method(), optimizer=OPTIMIZER, mixed=None, fingerprint=name,
    )  # fmt: skip
    return replace(plain, **extra)


def vit(data: Path, root: Path, name: str, **extra) -> RunSpec:
    """A network without BatchNorm."""
    (root / "vit").mkdir(exist_ok=True)
    (root / "vit" / "config.json").write_text(json.dumps({"model_type": "vit", "num_channels": 1, **VIT}))
    return run(data, root, name, network="transformers", parameters={"path": str(root / "vit"), "pretrained": False}, **extra)


class Shared(NamedTuple):
    specs: dict[str, RunSpec]
    error: str
    events: list[RunEvent]
    groups: list[tuple[str, int]]


@pytest.fixture(scope="module")
def shared(data, tmp_path_factory, ray_session, one_thread):
    """Runs by two workers each, in two groups at once; "resumed" goes on from the state of a training in one process."""
    root = tmp_path_factory.mktemp("shared")
    specs = [
        vit(data, root, "mdca", settings=Method(loss="mdca")),
        run(data, root, "wild", optimizer=replace(OPTIMIZER, learning_rate=1e30, clip=0.0)),
        vit(data, root, "resumed"),
        run(data, root, "streamed", optimizer=replace(OPTIMIZER, hold="stream")),
    ]
    storage.write_state(root / "resumed" / "state.pt", states_of(specs[2])[1])
    events, started = [], []
    with pytest.MonkeyPatch.context() as patch:
        group = groups.TorchTrainer

        def trainer(*args, **kwargs):
            started.append((kwargs["run_config"].name, kwargs["scaling_config"].num_workers))
            return group(*args, **kwargs)

        patch.setattr(groups, "TorchTrainer", trainer)
        with pytest.raises(RuntimeError) as caught:
            fit_many(specs, Group(workers=4, cpus=0.5), root / "ray", "shared", events.append, together=2)
    return Shared({spec.run: spec for spec in specs}, str(caught.value), events, started)


def states_of(spec: RunSpec) -> list[dict]:
    """The states after each epoch of ``spec``, trained in this process, in a folder of its own."""
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csm.runs.STATE_SECONDS", 0.0)
        patch.setattr("csm.runs.storage.write_state", lambda path, state: states.append(deepcopy(state)))
        fit_run(replace(spec, directory=spec.directory.with_name("states")))
    return states


def logits(directory: Path) -> torch.Tensor:
    frame = tables.read(directory / "predictions.parquet", tables.predictions(2))
    return torch.tensor(frame.sort("image_id")["logits"].to_numpy())


def events_of(shared: Shared, name: str) -> list[tuple[str, int]]:
    return [(event.kind, event.epoch) for event in shared.events if event.run == name]


@pytest.mark.parametrize("name", ["mdca", "resumed"])
def test_two_workers_do_what_one_process_does(shared, name, tmp_path):
    spec = shared.specs[name]
    fit_run(replace(spec, directory=tmp_path))
    assert torch.allclose(logits(spec.directory), logits(tmp_path), atol=1e-4)
    mine, direct = (storage.read_json(folder / "history.json") for folder in (spec.directory, tmp_path))
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in direct], rel=1e-4)
    assert storage.read_json(spec.directory / "run.json")["devices"] == 2
    assert storage.read_json(tmp_path / "run.json")["devices"] == 1


def test_a_run_goes_on_from_its_state(shared):
    assert events_of(shared, "resumed") == [("epoch", 3), ("epoch", 4), ("done", 0)]
    assert not (shared.specs["resumed"].directory / "state.pt").exists()


@pytest.mark.parametrize("name", ["streamed", "mdca"])
def test_only_one_of_two_workers_tells(shared, name):
    assert is_finished(shared.specs[name])
    assert events_of(shared, name) == [("epoch", 1), ("epoch", 2), ("epoch", 3), ("epoch", 4), ("done", 0)]


def test_what_is_not_equal_learns_as_well(shared):
    history = storage.read_json(shared.specs["streamed"].directory / "history.json")  # BatchNorm
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]


def test_groups_run_at_once_and_none_is_started_again(shared):
    assert shared.groups == [("shared-0", 2), ("shared-1", 2)]


def test_errors_of_all_workers_are_said_once_and_leave_other_runs_alone(shared):
    failed = {event.run: event.error for event in shared.events if event.kind == "failed"}
    assert sorted(failed) == ["wild"]
    assert [event.kind for event in shared.events].count("failed") == 1
    assert failed["wild"].startswith("FloatingPointError: training: loss is ")
    assert shared.error.startswith("1 of 4 trainings failed; ")


@pytest.mark.slow
def test_what_all_workers_refuse_is_said_once_and_another_run_learns(data, tmp_path):
    specs, events = [run(tmp_path, tmp_path, "nowhere"), run(data, tmp_path, "norm")], []
    with pytest.raises(RuntimeError, match="1 of 2 trainings failed; "):
        fit_many(specs, Group(cpus=0.5), tmp_path / "ray", "shared", events.append, together=2)
    (failed,) = [event.error for event in events if event.kind == "failed"]
    assert failed.startswith("InputError: ")
    assert "dataset.json does not exist" in failed
    told = [(event.kind, event.epoch) for event in events if event.run == "norm"]
    assert told == [("epoch", 1), ("epoch", 2), ("epoch", 3), ("epoch", 4), ("done", 0)]
    history = storage.read_json(tmp_path / "norm" / "history.json")
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]


@pytest.mark.parametrize(
    ("group", "together", "message"),
    [
        (Group(), 3, r"resources\.train: 3 workers x \(1 CPU, 0 GPU\) do not fit the cluster's 2 CPU and 0 GPU; lower"),
        (Group(workers=1), 3, r"resources\.train: 3 workers x \(1 CPU, 0 GPU\) do not fit"),
        (Group(workers=9), 2, r"resources\.train: 9 workers x \(1 CPU, 0 GPU\) do not fit"),
        (Group(gpus=1), 2, r"resources\.train: 1 workers x \(1 CPU, 1 GPU\) do not fit"),
    ],
)
def test_workers_that_do_not_fit_are_refused_before_work(data, tmp_path, group, together, message):
    with pytest.raises(InputError, match=message):
        fit_many([run(data, tmp_path, "any")], group, tmp_path, "test", pytest.fail, together)


def test_workers_of_one_run_do_not_share_a_gpu(data, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.training.share", lambda: {"CPU": 4.0, "GPU": 1.0})
    with pytest.raises(InputError, match=r"resources\.train\.gpus: expected 0 or at least 1 for each of 2 workers, got 0\.5"):
        fit_many([run(data, tmp_path, "any")], Group(gpus=0.5), tmp_path, "test", pytest.fail, together=2)


@pytest.mark.slow
def test_a_lost_worker_starts_its_group_again(data, tmp_path, ray_head, processes):
    """One of two workers is killed in the third epoch, before there is a state: the run starts anew and comes to its end."""
    raylet = ray_head.all_processes["raylet"][0].process.pid
    spec = run(data, tmp_path, "lost", optimizer=replace(OPTIMIZER, epochs=40))
    told, killed = [], []

    def on_event(event):
        told.append((event.kind, event.epoch))
        if event.epoch == 3 and not killed:
            workers = [pid for pid in processes.descendants(raylet) if "RayTrainWorker" in processes.name(pid)]
            assert len(workers) == 2
            killed.append(max(workers))
            os.kill(killed[0], signal.SIGKILL)

    fit_many([spec], Group(cpus=0.5), tmp_path / "ray", "lost", on_event, together=2)
    assert is_finished(spec)
    again = told.index(("lost", 0))
    assert told[:again] == [("epoch", epoch) for epoch in range(1, again + 1)]
    assert told[again + 1 :] == [("resumed", 0), *(("epoch", epoch) for epoch in range(1, 41)), ("done", 0)]
