"""One trial of a sweep, in its own process: the trainings of its specs, one after the other."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray.tune
import torch

from cluster.resources import Group
from cluster.streaming import open_stream
from cluster.training import RunEvent, TrainingError, fit_many
from cluster.tuning_population import population_history, snapshot_path, take_over
from csm import storage
from csm.errors import InputError
from csm.locations import location
from csm.runs import RunSpec, fit_run, is_finished
from csm.training import OnEpoch

Build = Callable[[int, Mapping[str, Any]], tuple[RunSpec, ...]]
History = list[dict[str, float]]
REPORT_SECONDS = 1.0  # between two reports that nothing depends on: each is a round trip during which the training waits


@dataclass(frozen=True)
class Race:
    """Which trials train on: what the scheduler sees are the epochs of a trial's first seed.

    Attributes:
        kind: all to the end ("none"), asynchronous successive halving ("asha") or population-based training ("pbt").
        metric: of an epoch, a key of what ``csm.training.fit`` tells: ``val_nll``, ``val_accuracy``, ``val_ece``.
        mode: "min" or "max", which is better.
        grace: of "asha": epochs before the first comparison.
        reduction: of "asha": one in so many goes on, and the next comparison is at so many times the epoch.
        interval: of "pbt": epochs between two comparisons.
        epochs: of the longest training.
    """

    kind: Literal["none", "asha", "pbt"] = "none"
    metric: str = "val_nll"
    mode: Literal["min", "max"] = "min"
    grace: int = 10
    reduction: int = 3
    interval: int = 10
    epochs: int = 60

    def decides(self, epoch: int) -> bool:
        """Whether trials are compared after ``epoch``."""
        if self.kind == "asha":
            rung = self.grace
            while rung < epoch:
                rung *= self.reduction
            return rung == epoch
        return self.kind == "pbt" and epoch % self.interval == 0


@dataclass(frozen=True)
class Work:
    """What is the same for all trials of a sweep; see ``cluster.tuning.run_trials``."""

    build: Build
    race: Race
    group: Group
    together: int
    directory: Path
    name: str


@dataclass(frozen=True)
class Standing:
    """A trial at an epoch after which the scheduler decides.

    Attributes:
        directory, fingerprint: of its first run.
        history: its epochs so far.
        values: with which it trains.
    """

    directory: str
    fingerprint: str
    history: History
    values: dict[str, Any]


def train_trial(config: dict[str, Any], work: Work) -> None:
    """Train trial ``config["number"]`` with ``config["values"]``, in a Tune actor.

    Every report holds ``events``: (seed, epoch, values, replayed) of the epochs since the last one, and ``losses``: what the trial's own
    worker group lost. One on which the scheduler decides has the epoch and its metric as well, and its ``standing``. The last one has
    ``end``: "done", "stopped" or "failed", the latter with ``error``.
    """
    report = _Report()
    try:
        ending = _train(config, work, report)
    except TrainingError as error:
        ending = {"end": "failed", "error": next(iter(error.errors.values()))}
    except Exception as error:  # whatever it is, it ends this trial alone, and the driver tells it
        ending = {"end": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    report.send(**ending, done=True)


class _Report:
    """What the driver is still to be told."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, dict[str, float], bool]] = []
        self.losses: list[RunEvent] = []
        self.last = time.monotonic()

    def add(self, seed: int, epoch: int, values: dict[str, float], replayed: bool) -> None:
        self.events.append((seed, epoch, values, replayed))
        if time.monotonic() - self.last >= REPORT_SECONDS:
            self.send()

    def lose(self, event: RunEvent) -> None:
        self.losses.append(event)

    def send(self, **fields: Any) -> None:
        """Tell it; comes back when the driver wants the trial to go on, and ends the thread if it does not."""
        ray.tune.report({"events": self.events, "losses": self.losses, **fields})
        self.events, self.losses, self.last = [], [], time.monotonic()


def _train(config: dict[str, Any], work: Work, report: _Report) -> dict[str, Any]:
    """Train what is to be trained; gives the fields of the last report."""
    specs, race, values = _specs(config, work), work.race, config["values"]
    first = specs[0]
    taken = population_history(first.directory)
    history: History = []  # of the first seed
    final: dict[str, Any] = {}

    def tell(spec: RunSpec, epoch: int, measured: dict[str, float], replayed: bool = False) -> None:
        nonlocal final
        if spec is not first or race.kind == "none":
            report.add(spec.seed, epoch, measured, replayed)
            return
        if race.metric not in measured:
            raise InputError(f"tune.scheduler.metric: a training tells {', '.join(measured)} of an epoch, not {race.metric}")
        history.append({"epoch": epoch, **measured})
        report.events.append((spec.seed, epoch, measured, replayed))
        if epoch == spec.optimizer.epochs:
            final = {
                "epoch": epoch,
                race.metric: measured[race.metric],
            }  # it waits for the other seeds: then it is all of the trial
        elif race.decides(epoch) and (replayed or race.kind == "asha"):
            compare(replayed)

    def compare(replayed: bool) -> None:
        epoch = int(history[-1]["epoch"])
        at = [values, *(record["values"] for record in taken if record["epoch"] < epoch)][-1]
        standing = Standing(str(first.directory), first.fingerprint, history, dict(at))
        report.send(epoch=epoch, **{race.metric: history[-1][race.metric]}, standing=standing, replayed=replayed)

    def on_state(state: dict[str, Any]) -> None:
        """Of a population, whose members are compared when there is a state that others may take over."""
        epoch = state["training"]["epoch"]
        if race.decides(epoch):
            storage.write_state(snapshot_path(first.directory, epoch), state)
            compare(replayed=False)

    stopped = stopped_history(first)
    for spec in specs:
        for record in stopped or _history(spec):
            past = dict(record)
            tell(spec, int(past.pop("epoch")), past, replayed=True)
        if stopped:
            return {"end": "stopped"}
        _fit(spec, partial(tell, spec), on_state if race.kind == "pbt" else None, report.lose, config["number"], work)
    return {"end": "done", **final}


def _specs(config: dict[str, Any], work: Work) -> tuple[RunSpec, ...]:
    """The runs of a trial; of a population, with the state and the values that it took over last."""
    number, donor = config["number"], config.get("donor")
    specs = work.build(number, config["values"])
    if work.race.kind != "pbt":
        return specs
    if len(specs) > 1 or work.together > 1:
        raise InputError(
            "tune.scheduler.kind: pbt trains one seed of each trial, with one worker; take tune.seeds=1 or another kind"
        )
    if donor is not None:
        values = donor.values
        try:
            specs = work.build(number, values)
        except InputError:  # a number left its range
            values = donor.fallback
            specs = work.build(number, values)
        take_over(specs[0], donor, values)
    taken = population_history(specs[0].directory)
    return work.build(number, taken[-1]["values"]) if taken else specs


def _fit(
    spec: RunSpec,
    on_epoch: OnEpoch,
    on_state: Callable[[dict[str, Any]], None] | None,
    on_loss: Callable[[RunEvent], None],
    number: int,
    work: Work,
) -> None:
    """Train ``spec`` here, or by a worker group of its own."""
    if is_finished(spec):
        return
    if work.together > 1:
        group = replace(work.group, workers=work.together)
        name = f"{work.name}-trial-{number}-seed{spec.seed}"
        heard: set[int] = set()  # a group that starts again tells some epochs again

        def hear(event: RunEvent) -> None:
            if event.kind == "epoch" and event.epoch not in heard:
                heard.add(event.epoch)
                on_epoch(event.epoch, event.values)
            elif event.kind in ("lost", "resumed"):
                on_loss(event)

        fit_many([spec], group, work.directory, name, hear, work.together)
        return
    torch.set_num_threads(max(1, round(work.group.cpus)))
    device = torch.device("cuda" if work.group.gpus else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as cluster.training.worker_device
    fit_run(spec, on_epoch, device, stream=open_stream, on_state=on_state)


def _history(spec: RunSpec) -> History:
    """The epochs that ``spec`` has behind it."""
    if is_finished(spec):
        history: History = storage.read_json(spec.directory / "history.json")
        return history
    path = spec.directory / "state.pt"
    state = storage.read_state(path) if path.is_file() else {}
    return list(state["history"]) if state.get("fingerprint") == spec.fingerprint else []


def note_stop(standing: Standing) -> None:
    """Write down that the scheduler ended a trial, so that it is not trained again."""
    record = {"fingerprint": standing.fingerprint, "history": standing.history}
    storage.write_json(location(standing.directory) / "stopped.json", record)


def stopped_history(spec: RunSpec) -> History:
    """The epochs of a trial that the scheduler ended; none if it did not."""
    path = spec.directory / "stopped.json"
    record = storage.read_json(path) if path.is_file() else {}
    return list(record["history"]) if record.get("fingerprint") == spec.fingerprint else []
