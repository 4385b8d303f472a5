"""Nodes that are lost in the middle of trainings, on a cluster of several raylets on this machine.

The oracle: classifiers that one process each trains have the bytes of a direct `csm.runs.fit_run`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.fitting import fit_in_group
from cluster.groups import Delay, Setback
from cluster.resources import Group
from cluster.session import session
from cluster.training import RunEvent, fit_many
from cluster.tuning import TrialEvent, run_trials
from cluster.tuning_trials import Race
from csm import storage
from csm.datasets.real import build
from csm.generators.config import GeneratorConfig
from csm.generators.fitting import FitJob, fit_job
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec, fit_run, is_finished
from tests.nodes import STORE, start_head

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]

EPOCHS = 200
FILES = ("model.safetensors", "model.json", "predictions.parquet", "history.json")


class Nodes:
    """A head without CPUs, on which the driver is, and two nodes of two CPUs."""

    def __init__(self, processes: Any) -> None:
        self.cluster = start_head()
        self.processes = processes
        self.workers: list[Any] = []
        for _ in range(2):
            self.add()
        self.lost = 0

    def add(self) -> None:
        self.workers.append(self.cluster.add_node(num_cpus=2, **STORE))
        self.cluster.wait_for_nodes()

    def at_work(self, title: str) -> list[Any]:
        """The nodes that have a process with that title."""

        def has(node: Any) -> bool:
            below = self.processes.descendants(node.all_processes["raylet"][0].process.pid)
            return any(title in self.processes.name(pid) for pid in below)

        return [node for node in self.workers if has(node)]

    def lose(self, node: Any) -> None:
        self.lost += 1
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def nodes(processes) -> Iterator[Nodes]:
    nodes = Nodes(processes)
    with session(nodes.cluster.address):
        yield nodes
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a data set of 60 grey images, 8 by 8, of 2 classes."""
    draw = np.random.default_rng(1)
    labels = np.arange(60) % 2
    images = (draw.integers(0, 100, (60, 8, 8, 1)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    folder = tmp_path_factory.mktemp("data")
    build("noise", images, labels, np.array(["train", "val", "train", "test", "train"] * 12), ["a", "b"]).save(folder)
    return folder


def run(data: Path, root: Path, name: str, epochs: int) -> RunSpec:
    return RunSpec(
        run=name, method=name, seed=0, directory=root / name, data=data, network="small-cnn", parameters={"width": 4},
        settings=Method(), optimizer=OptimizerConfig(epochs=epochs, batch_size=12), mixed=None, fingerprint=name,
    )  # fmt: skip


def assert_as_direct(spec: RunSpec, root: Path) -> None:
    fit_run(replace(spec, directory=root / "direct" / spec.run))
    for file in FILES:
        assert (spec.directory / file).read_bytes() == (root / "direct" / spec.run / file).read_bytes(), file


def epochs_of(events: list[RunEvent], name: str) -> list[int]:
    return [event.epoch for event in events if event.run == name and event.kind == "epoch"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_trainings_go_on_with_the_workers_that_are_left(nodes, data, tmp_path):
    """Of 4 workers, 2 are lost with their node; the group starts again with 2, and no classifier is another than it would have been."""
    specs = [run(data, tmp_path, f"run-{number}", EPOCHS) for number in range(4)]
    told: list[RunEvent] = []

    def on_event(event: RunEvent) -> None:
        told.append(event)
        if not nodes.lost and len({event.run for event in told}) == 4 and event.epoch > 20:
            nodes.lose(nodes.workers[0])

    fit_many(specs, Group(workers=4), tmp_path / "ray", "test", on_event)
    lost = [event for event in told if event.kind == "lost"]
    assert [event.values["workers"] for event in lost] == [2.0]
    assert re.search("2 workers.* lost", lost[0].error)  # Ray may know of the processes before it knows of the node
    for spec in specs:
        assert [event.kind for event in told if event.run == spec.run and event.kind != "epoch"][-1] == "done"
        assert epochs_of(told, spec.run)[-1] == EPOCHS
        assert_as_direct(spec, tmp_path)
    # What was under way went on from its state, if ten seconds had given it one, and what was done stayed.
    resumed = {event.run: event for event in told if event.kind == "resumed"}
    assert resumed
    for event in resumed.values():
        assert 0 <= event.values["repeated"] < event.values["late"]
    assert [event.kind for event in told].count("done") == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_of_two_workers_waits_for_a_node_and_goes_on_from_its_state(nodes, data, tmp_path):
    nodes.lose(nodes.workers[0])
    nodes.lost = 0
    spec = run(data, tmp_path, "shared", 2500)
    told: list[RunEvent] = []

    def on_event(event: RunEvent) -> None:
        told.append(event)
        if not nodes.lost and (spec.directory / "state.pt").is_file():
            nodes.lose(nodes.workers[0])
        if event.kind == "lost" and event.error.startswith("waiting for nodes"):
            nodes.add()

    fit_many([spec], Group(), tmp_path / "ray", "test", on_event, together=2)
    assert is_finished(spec)
    assert storage.read_json(spec.directory / "run.json")["devices"] == 2
    lost = [event for event in told if event.kind == "lost"]
    assert sum(event.values["workers"] for event in lost) in (1.0, 2.0)
    assert lost[-1].error.startswith(
        "waiting for nodes (resources.train: 2 workers x (1 CPU, 0 GPU) do not fit the cluster's 0 CPU"
    )
    (resumed,) = (event for event in told if event.kind == "resumed")
    assert resumed.epoch > 0
    assert 0 <= resumed.values["repeated"] < resumed.values["late"]
    again = told.index(resumed) + 1
    assert [event.epoch for event in told[again:-1]] == list(range(resumed.epoch + 1, 2501))
    assert [row["epoch"] for row in storage.read_json(spec.directory / "history.json")] == list(range(1, 2501))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_generator_is_trained_on_by_the_workers_that_are_left(nodes, data, tmp_path):
    config = GeneratorConfig(block_channels=(8, 16), steps=600, batch_size=12, checkpoint_steps=50)
    job = FitJob(data, tmp_path / "generator", config, "fingerprint")
    told: list[tuple[int, float]] = []
    losses: list[Setback | Delay] = []

    def on_step(step: int, loss: float) -> None:
        told.append((step, loss))
        if not nodes.lost and step > 120:
            nodes.lose(nodes.workers[0])

    fit_in_group(job, Group(workers=4), tmp_path / "ray", "test", on_step, losses.append)
    setback, delay = losses[0], losses[-1]
    assert isinstance(setback, Setback)
    assert isinstance(delay, Delay)
    assert delay.step >= 100
    assert delay.step % 50 == 0
    assert delay.repeated < delay.late
    known = dict(told)
    assert sorted(known) == list(range(1, 601))
    direct: list[float] = []
    fit_job(replace(job, directory=tmp_path / "direct"), lambda step, loss: direct.append(loss))
    assert [known[step] for step in range(1, 601)] == pytest.approx(direct, rel=0.05)


def trials(count: int) -> Callable[[], tuple[int, dict[str, Any]] | None]:
    numbers = iter(range(count))
    return lambda: (number, {}) if (number := next(numbers, None)) is not None else None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("together", "title", "epochs"), [(1, "ImplicitFunc", 1500), (2, "RayTrainWorker", 600)])
def test_no_trial_of_a_sweep_is_lost(nodes, data, tmp_path, together, title, epochs):
    def build(number: int, values: Any) -> tuple[RunSpec, ...]:
        return (run(data, tmp_path, f"trial-{number}", epochs),)

    told: list[TrialEvent] = []

    def on_event(event: TrialEvent) -> None:
        told.append(event)
        if nodes.lost:
            return
        train = {event.trial for event in told if event.epoch > 50} - {event.trial for event in told if event.kind == "done"}
        if len(train) * together > 2:  # more than a node has room for: of either, epochs of a trial were heard
            nodes.lose(nodes.at_work(title)[0])

    run_trials(trials(5), build, Race(epochs=epochs), Group(), together, tmp_path / "ray", "test", on_event)
    assert nodes.lost == 1
    assert sorted(event.trial for event in told if event.kind == "done") == [0, 1, 2, 3, 4]
    assert any(event.kind == "lost" for event in told)
    resumed = [event for event in told if event.kind == "resumed"]
    assert resumed
    assert all(event.values["repeated"] < event.values["late"] for event in resumed)
    for number in range(5):
        mine = [event for event in told if event.trial == number]
        assert [event.kind for event in mine].count("started") == 1
        assert [event.epoch for event in mine if event.kind == "epoch"] == list(range(1, epochs + 1))
        spec = build(number, {})[0]
        assert is_finished(spec)
        if together == 1:
            assert_as_direct(spec, tmp_path)
