"""Trainings of classifiers in Ray Train worker groups: many to a group, each by one worker or by all of them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from ray.train import get_context

from cluster.groups import FAILED, Events, Pace, Setback, run_groups, worker_device, workers_now
from cluster.resources import Group, group_size
from cluster.session import share
from cluster.streaming import open_stream
from csm.errors import InputError
from csm.runs import RunSpec, fit_run, is_finished
from csm.world import ALONE, World


class RunEvent(NamedTuple):
    """What the driver hears of a training.

    Attributes:
        run: its name; "" of "lost".
        kind: an "epoch" with its ``values``; "done"; "failed" by ``error``; "broken" by ``error``, so that it is tried again; "lost": a
            group starts again because of ``error``, with ``values`` "workers" that are gone; "resumed": after that, from ``epoch``, with
            what it cost in seconds as ``values``: "repeated" (work that is done again) and "late" (against the time without the loss).
    """

    run: str
    kind: Literal["epoch", "done", "failed", "broken", "lost", "resumed"]
    epoch: int
    values: dict[str, float]
    error: str


BY_USER = f"{InputError.__name__}: "  # how the error of a run begins that the user can mend


class TrainingError(RuntimeError):
    """Some of many trainings failed; ``errors``: run -> its error; ``is_input``: all of them by what the user gave."""

    def __init__(self, errors: dict[str, str], total: int) -> None:
        run, error = next(iter(errors.items()))
        super().__init__(f"{len(errors)} of {total} trainings failed; {run}: {error.removeprefix(BY_USER)}")
        self.errors = errors
        self.is_input = all(text.startswith(BY_USER) for text in errors.values())


def fit_many(
    specs: Sequence[RunSpec],
    group: Group,
    directory: Path,
    name: str,
    on_event: Callable[[RunEvent], None],
    together: int = 1,
) -> None:
    """Train every unfinished run of ``specs``, each by ``together`` workers, on their GPUs if the group has any.

    A worker group costs seconds, so small trainings share one: worker r of n takes runs r, r + n, ... With ``together`` above 1 there
    are as many groups of that many workers as ``group`` has room for, and group r of n takes runs r, r + n, ...; the workers of a group
    share every batch, see ``csm.training.fit``. A lost worker restarts its group, smaller if there is no room for as many: finished runs
    stay, the others go on from their last state. A run that fails is reported once and leaves the others alone.

    Args:
        specs: the runs; their folders are on storage that every node sees.
        group: workers of all groups together (``together`` at least), and what each takes.
        directory: where Ray Train keeps its own records.
        name: of the group, for those records.
        on_event: called in the driver, in order for each run.
        together: workers that train each run.

    Raises:
        InputError: the workers do not fit the cluster.
        TrainingError: runs failed; the message names the first one and its error.
    """
    todo = [spec for spec in specs if not is_finished(spec)]
    if not todo:
        return
    shares = _shares(todo, group, together)
    errors: dict[str, str] = {}
    broken: list[RunEvent] = []  # by what may be mended by another try; the last one is why there was none
    ended: set[str] = set()
    paces: dict[str, Pace] = defaultdict(Pace)

    def hear(item: Any) -> bool:
        event = RunEvent(*item)
        if event.kind == "broken":
            broken.append(event)
            return False
        if event.kind != "epoch":
            ended.add(event.run)
        new = event.kind != "epoch" or event.epoch not in paces[event.run].times
        if event.kind == "epoch" and (delay := paces[event.run].hear(event.epoch)) is not None:
            cost = {"repeated": delay.repeated, "late": delay.late}
            on_event(RunEvent(event.run, "resumed", delay.step, cost, ""))
        on_event(event)
        if event.kind == "failed":
            errors[event.run] = event.error
        return new

    def prepare(number: int, again: bool) -> tuple[int, dict[str, Any]]:
        left = [spec for spec in shares[number] if spec.run not in ended]
        if not left:
            return 0, {}
        if together > 1:
            group_size(replace(group, workers=together), together, share())
        workers = together if together > 1 else workers_now(group, len(left), again)
        return workers, {"specs": left, "together": together}

    def lose(number: int, setback: Setback) -> None:
        for spec in shares[number]:
            paces[spec.run].interrupt()
        reason = f"{FAILED} ({broken[-1].error})" if setback.reason == FAILED and broken else setback.reason
        on_event(RunEvent("", "lost", 0, {"workers": float(setback.workers)}, reason))

    try:
        run_groups(_train_share, len(shares), prepare, group, directory, name, hear, lose)
    except Exception as error:
        if broken:
            raise RuntimeError(f"training {broken[-1].run}: {broken[-1].error}") from error
        raise
    if errors:
        raise TrainingError(errors, len(todo))
    unfinished = [spec.run for spec in todo if not is_finished(spec)]
    if unfinished:
        raise RuntimeError(f"{len(unfinished)} of {len(todo)} trainings did not finish, among them {unfinished[0]}: run again")


def _shares(todo: Sequence[RunSpec], group: Group, together: int) -> list[Sequence[RunSpec]]:
    """The runs of each group; ``InputError`` if the workers do not fit the cluster."""
    if together == 1:
        return [todo]
    if 0 < group.gpus < 1:
        raise InputError(f"resources.train.gpus: expected 0 or at least 1 for each of {together} workers, got {group.gpus:g}")
    size = group_size(group, len(todo) * together, share())
    if size < together:
        size = group_size(replace(group, workers=together), together, share())
    return [todo[number :: size // together] for number in range(min(size // together, len(todo)))]


def _train_share(config: dict[str, Any]) -> None:
    """Worker: fit this rank's share of the runs, or its share of every run of the group."""
    torch.set_num_threads(config["threads"])
    device, context, events = worker_device(), get_context(), config["events"]
    rank, size = context.get_world_rank(), context.get_world_size()
    # With one worker for each run, torch's process group is there as well, but they have nothing to tell each other.
    world = World(rank, size) if config["together"] > 1 else ALONE
    for spec in config["specs"] if world.size > 1 else config["specs"][rank::size]:
        error = _try_run(spec, device, world, events)
        if error is not None and world.rank == 0:
            events.put((spec.run, "failed", 0, {}, f"{type(error).__name__}: {error}"))
        elif world.rank == 0:
            events.put((spec.run, "done", 0, {}, ""))


def _try_run(spec: RunSpec, device: torch.device, world: World, events: Events) -> Exception | None:
    """Fit ``spec``; give the error that ended it on every rank alike, so that the others can go on to the next run."""

    def on_epoch(epoch: int, values: dict[str, float]) -> None:
        events.put((spec.run, "epoch", epoch, values, ""))

    try:
        fit_run(spec, on_epoch, device, world, open_stream)
    except (InputError, FloatingPointError) as error:
        return error
    except (ValueError, RuntimeError, OSError) as error:
        if world.size == 1:
            return error
        # The others wait for this rank, or it noticed that another one is lost: Ray Train stops them all and starts again.
        events.put((spec.run, "broken", 0, {}, f"{type(error).__name__}: {error}"))
        raise
    return None
