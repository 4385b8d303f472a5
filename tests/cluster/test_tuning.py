"""The oracle: a run trained in a trial equals a direct `csm.runs.fit_run`, bit for bit."""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.resources import Group
from cluster.training import BY_USER
from cluster.tuning import TrialEvent, run_trials
from cluster.tuning_population import population_history
from cluster.tuning_trials import Race
from csm import storage
from csm.datasets.real import build
from csm.errors import InputError
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec, fit_run, is_finished

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session", "one_thread")]

FILES = ("model.safetensors", "model.json", "predictions.parquet", "history.json")
ONE = Group(workers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a data set of 60 grey images, 8 by 8, of 2 classes."""
    draw = np.random.default_rng(1)
    labels = np.arange(60) % 2
    images = (draw.integers(0, 100, (60, 8, 8, 1)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    folder = tmp_path_factory.mktemp("data")
    build("noise", images, labels, np.array(["train", "val", "train", "test", "train"] * 12), ["a", "b"]).save(folder)
    return folder


def make_specs(number: int, values: dict[str, Any], data: Path, root: Path) -> tuple[RunSpec, ...]:
    """Runs of trial ``number``: ``seeds``, ``fail``, and settings of the optimizer are its values."""
    values = dict(values)
    seeds, fail = values.pop("seeds", 1), values.pop("fail", None)
    if fail == "exception":
        raise KeyError("no such\nthing")
    if fail == "exit":
        os._exit(1)
    if fail == "input":
        data = data / "nowhere"
    optimizer = OptimizerConfig(**{"epochs": 3, "batch_size": 12, "learning_rate": 0.02, **values})
    return tuple(
        RunSpec(
            run=f"trial-{number}-seed{seed}", method="plain", seed=seed, directory=root / f"{number:04d}" / f"seed{seed}", data=data,
            network="small-cnn", parameters={"width": 4}, settings=Method(), optimizer=optimizer, mixed=None,
            fingerprint=storage.digest(number, values, seed),
        )
        for seed in range(seeds)
    )  # fmt: skip


class Sweep:
    """Trials with the given values, and what was heard of them."""

    def __init__(self, data: Path, root: Path, trials: list[dict[str, Any]]) -> None:
        self.data, self.root, self.trials = data, root, trials
        self.events: list[TrialEvent] = []
        self.asked: list[int] = []

    def specs(self, number: int) -> tuple[RunSpec, ...]:
        return make_specs(number, self.trials[number], self.data, self.root)

    def run(self, race: Race | None = None, group: Group = ONE, together: int = 1, ask: Callable | None = None) -> None:
        data, root = self.data, self.root

        def build(number, values):
            return make_specs(number, values, data, root)

        def next_trial() -> tuple[int, dict[str, Any]] | None:
            if len(self.asked) == len(self.trials):
                return None
            self.asked.append(len(self.asked))
            return self.asked[-1], self.trials[self.asked[-1]]

        run_trials(ask or next_trial, build, race or Race(epochs=3), group, together, root / "ray", "test", self.events.append)

    def of(self, number: int) -> list[tuple[str, int, int]]:
        return [(event.kind, event.seed, event.epoch) for event in self.events if event.trial == number]

    def ends(self) -> dict[int, str]:
        return {event.trial: event.kind for event in self.events if event.kind not in ("started", "epoch")}


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory, ray_session, one_thread) -> Sweep:
    """Good trials and three that fail, one after the other."""
    trials = [{"seeds": 2}, {"fail": "exception"}, {"learning_rate": 1e30}, {"fail": "input"}, {"learning_rate": 0.05}]
    sweep = Sweep(data, tmp_path_factory.mktemp("mixed"), trials)
    sweep.run()
    return sweep


@pytest.mark.parametrize("number", [0, 4])
def test_a_run_of_a_trial_equals_a_direct_one(mixed, number, tmp_path):
    for spec in mixed.specs(number):
        fit_run(replace(spec, directory=tmp_path))
        for file in FILES:
            assert (spec.directory / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_every_trial_starts_once_and_ends_once(mixed):
    assert mixed.of(0) == [("started", 0, 0), *[("epoch", seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)], ("done", 0, 0)]
    assert mixed.ends() == {0: "done", 1: "failed", 2: "failed", 3: "failed", 4: "done"}
    for kind in ("started", "end"):
        trials = [
            event.trial
            for event in mixed.events
            if (event.kind not in ("started", "epoch")) == (kind == "end") and event.kind != "epoch"
        ]
        assert trials == [0, 1, 2, 3, 4]


def test_epochs_are_told_with_what_was_measured(mixed):
    history = storage.read_json(mixed.specs(4)[0].directory / "history.json")
    assert [{"epoch": e.epoch, **e.values} for e in mixed.events if e.trial == 4 and e.kind == "epoch"] == history


def test_a_failed_trial_tells_its_error_in_one_line(mixed):
    errors = {event.trial: event.error for event in mixed.events if event.kind == "failed"}
    assert errors[1] == "KeyError: 'no such\\nthing'"
    assert errors[2].startswith("FloatingPointError: training: loss is ")
    assert errors[3].startswith(BY_USER)
    assert not any("\n" in error for error in errors.values())


def test_a_trial_that_does_not_fit_is_refused_before_it_is_asked(data, tmp_path):
    with pytest.raises(InputError, match=r"resources\.train: .* do not fit the cluster's 2 CPU"):
        Sweep(data, tmp_path, [{}]).run(group=Group(cpus=3))
    with pytest.raises(InputError, match=r"resources\.train: 3 workers .* do not fit the cluster's 2 CPU"):
        Sweep(data, tmp_path, [{}]).run(together=3, group=Group())


@pytest.mark.slow
def test_what_the_caller_raises_comes_through(data, tmp_path):
    sweep = Sweep(data, tmp_path, [{}, {}])
    sweep.events = type("Full", (), {"append": lambda self, event: (_ for _ in ()).throw(OSError(28, "full"))})()
    with pytest.raises(OSError, match="full"):
        sweep.run()


HALVING = Race("asha", grace=1, reduction=3, epochs=9)


@pytest.fixture(scope="module")
def halved(data, tmp_path_factory, ray_session, one_thread) -> Sweep:
    """A trial that learns, one that learns nothing and one that learns faster, each with two seeds, one after the other."""
    trials = [{"epochs": 9, "seeds": 2, "learning_rate": rate} for rate in (0.01, 1e-9, 0.1)]
    sweep = Sweep(data, tmp_path_factory.mktemp("halved"), trials)
    sweep.run(HALVING)
    return sweep


def test_halving_stops_what_is_worse_at_the_first_rung(halved):
    assert halved.ends() == {0: "done", 1: "stopped", 2: "done"}
    assert halved.of(1) == [("started", 0, 0), ("epoch", 0, 1), ("stopped", 0, 0)]


def test_only_what_survives_trains_its_other_seeds(halved):
    assert [[is_finished(spec) for spec in halved.specs(number)] for number in range(3)] == [[True] * 2, [False] * 2, [True] * 2]
    epochs = [("epoch", seed, epoch) for seed in (0, 1) for epoch in range(1, 10)]
    assert halved.of(0) == halved.of(2) == [("started", 0, 0), *epochs, ("done", 0, 0)]


def test_trials_asked_again_are_repeated_not_trained_and_their_rungs_are_there(halved, snapshot):
    before = snapshot(halved.root)
    again = Sweep(halved.data, halved.root, [*halved.trials, {"epochs": 9, "learning_rate": 2e-9}])
    again.run(HALVING)
    assert [again.of(number) for number in range(3)] == [halved.of(number) for number in range(3)]
    assert [event for event in again.events if event.trial < 3] == halved.events
    assert again.ends()[3] == "stopped"
    runs = {path: stamp for path, stamp in snapshot(halved.root).items() if not path.startswith(("ray/", "0003/"))}
    assert runs == {path: stamp for path, stamp in before.items() if not path.startswith("ray/")}


def test_a_trial_goes_on_from_its_state(data, tmp_path, monkeypatch):
    sweep = Sweep(data, tmp_path, [{"epochs": 4}])
    monkeypatch.setattr("csm.runs.STATE_SECONDS", 0.0)

    def stop(epoch: int, values: dict[str, float]) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_run(sweep.specs(0)[0], stop)
    state = storage.read_state(sweep.specs(0)[0].directory / "state.pt")
    assert len(state["history"]) == 2
    state["history"][0]["loss"] = -1.0  # which shows that it is not trained again
    storage.write_state(sweep.specs(0)[0].directory / "state.pt", state)
    sweep.run()
    assert sweep.of(0) == [("started", 0, 0), *[("epoch", 0, epoch) for epoch in range(1, 5)], ("done", 0, 0)]
    assert sweep.events[1].values["loss"] == -1.0
    fit_run(replace(sweep.specs(0)[0], directory=tmp_path / "direct"))
    model = (tmp_path / "direct" / "model.safetensors").read_bytes()
    assert (sweep.specs(0)[0].directory / "model.safetensors").read_bytes() == model


def trial_processes(processes, ray_head) -> list[int]:
    raylet = ray_head.all_processes["raylet"][0].process.pid
    return [pid for pid in processes.descendants(raylet) if "ImplicitFunc" in processes.name(pid)]


@pytest.mark.slow
def test_a_trial_whose_process_is_lost_is_tried_again(data, tmp_path, ray_head, processes):
    sweep, killed = Sweep(data, tmp_path, [{"epochs": 400}, {}]), []

    class Killing(list):
        def append(self, event):
            super().append(event)
            if event.kind == "epoch" and not killed:
                killed.extend(trial_processes(processes, ray_head))
                processes.kill(killed)

    sweep.events = Killing()
    sweep.run()
    assert len(killed) == 1
    assert sweep.of(0) == [("started", 0, 0), *[("epoch", 0, epoch) for epoch in range(1, 401)], ("done", 0, 0)]
    assert sweep.ends() == {0: "done", 1: "done"}
    fit_run(replace(sweep.specs(0)[0], directory=tmp_path / "direct"))
    model = (tmp_path / "direct" / "model.safetensors").read_bytes()
    assert (sweep.specs(0)[0].directory / "model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_a_trial_whose_process_is_lost_again_and_again_fails(data, tmp_path):
    sweep = Sweep(data, tmp_path, [{"fail": "exit"}, {}])
    sweep.run()
    assert sweep.of(0) == [("started", 0, 0), ("failed", 0, 0)]
    assert "lost 4 times" in sweep.events[1].error
    assert sweep.ends() == {0: "failed", 1: "done"}


@pytest.mark.slow
def test_two_workers_train_each_run_of_a_trial(data, tmp_path):
    sweep = Sweep(data, tmp_path, [{"seeds": 2}, {"learning_rate": 1e30, "clip": 0.0}, {"epochs": 9, "learning_rate": 1e-9}])
    sweep.run(HALVING, Group(), together=2)
    assert sweep.ends() == {0: "done", 1: "failed", 2: "stopped"}
    assert [storage.read_json(spec.directory / "run.json")["devices"] for spec in sweep.specs(0)] == [2, 2]
    assert sweep.of(0) == [("started", 0, 0), *[("epoch", seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)], ("done", 0, 0)]
    assert next(event.error for event in sweep.events if event.kind == "failed").startswith(
        "FloatingPointError: training: loss is"
    )


POPULATION = Race("pbt", interval=1, epochs=3)


@pytest.fixture(scope="module")
def population(data, tmp_path_factory, ray_session, one_thread) -> Sweep:
    """A trial that learns and then one that does not."""
    sweep = Sweep(data, tmp_path_factory.mktemp("population"), [{"learning_rate": rate} for rate in (0.02, 1e-9)])
    sweep.run(POPULATION)
    return sweep


def test_a_bad_trial_goes_on_from_a_good_one(population, tmp_path):
    good, bad = (population.specs(number)[0] for number in range(2))
    assert population_history(good.directory) == []
    taken = population_history(bad.directory)
    assert (taken[0]["epoch"], taken[0]["donor"]) == (1, 0)
    assert taken[0]["values"]["learning_rate"] in (pytest.approx(0.016), pytest.approx(0.024))
    for number in range(2):
        assert population.of(number) == [("started", 0, 0), *[("epoch", 0, epoch) for epoch in range(1, 4)], ("done", 0, 0)]
    history = storage.read_json(bad.directory / "history.json")
    assert [row["epoch"] for row in history] == [1, 2, 3]
    # By hand: some epochs of the good one, then on with the other values.
    states = []
    fit_run(replace(good, directory=tmp_path / "good"), on_state=lambda state: states.append(deepcopy(state)))
    spec = replace(make_specs(1, taken[-1]["values"], population.data, tmp_path)[0], directory=tmp_path / "on")
    storage.write_state(spec.directory / "state.pt", {**states[taken[-1]["epoch"] - 1], "fingerprint": spec.fingerprint})
    fit_run(spec)
    assert (bad.directory / "model.safetensors").read_bytes() == (spec.directory / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_population_asked_again_is_repeated(population, snapshot):
    before = snapshot(population.root)
    again = Sweep(population.data, population.root, population.trials)
    again.run(POPULATION)
    assert again.events == population.events
    assert {
        path for path, stamp in snapshot(population.root).items() if stamp != before.get(path) and not path.startswith("ray/")
    } == set()


@pytest.mark.slow
def test_a_population_has_one_seed(data, tmp_path):
    sweep = Sweep(data, tmp_path, [{"seeds": 2}])
    sweep.run(POPULATION)
    assert sweep.events[1].error.startswith(f"{BY_USER}tune.scheduler.kind: pbt trains one seed")
