"""The oracle: a run trained in a trial equals a direct `csm.runs.fit_run`, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.resources import Group
from cluster.training import BY_USER
from cluster.tuning import TrialEvent, run_trials
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


def test_what_the_caller_raises_comes_through(data, tmp_path):
    sweep = Sweep(data, tmp_path, [{}, {}])
    sweep.events = type("Full", (), {"append": lambda self, event: (_ for _ in ()).throw(OSError(28, "full"))})()
    with pytest.raises(OSError, match="full"):
        sweep.run()
