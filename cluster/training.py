"""Trainings of classifiers in Ray Train worker groups: many to a group, each by one worker or by all of them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Queue

from cluster.resources import Group, group_size
from cluster.session import records_in
from cluster.streaming import open_stream
from csm.errors import InputError
from csm.runs import RunSpec, fit_run, is_finished
from csm.world import ALONE, World


class RunEvent(NamedTuple):
    """What the driver hears of a training: an epoch's values, that it is done, or why it failed ("broken": it is tried again)."""

    run: str
    kind: Literal["epoch", "done", "failed", "broken"]
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
    share every batch, see ``csm.training.fit``. A lost worker restarts its group, up to three times: finished runs stay, the others go
    on from their last state. A run that fails is reported once and leaves the others alone.

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
    errors: dict[str, str] = {}
    broken: list[RunEvent] = []  # by what may be mended by another try; the last one is why there was none

    def hear(item: Any) -> None:
        event = RunEvent(*item)
        if event.kind == "broken":
            broken.append(event)
            return
        on_event(event)
        if event.kind == "failed":
            errors[event.run] = event.error

    if together == 1:
        workers, shares = group_size(group, len(todo), ray.cluster_resources()), [todo]
    else:
        workers = together
        size = group_size(group, len(todo) * together, ray.cluster_resources())
        if size < together:
            size = group_size(replace(group, workers=together), together, ray.cluster_resources())
        shares = [todo[number :: size // together] for number in range(min(size // together, len(todo)))]
        if 0 < group.gpus < 1:
            raise InputError(f"resources.train.gpus: expected 0 or at least 1 for each of {together} workers, got {group.gpus:g}")
    try:
        settings = [{"specs": share, "together": together} for share in shares]
        run_groups(_train_share, settings, workers, group, directory, name, hear)
    except Exception as error:
        if broken:
            raise RuntimeError(f"training {broken[-1].run}: {broken[-1].error}") from error
        raise
    if errors:
        raise TrainingError(errors, len(todo))
    unfinished = [spec.run for spec in todo if not is_finished(spec)]
    if unfinished:
        raise RuntimeError(f"{len(unfinished)} of {len(todo)} trainings did not finish, among them {unfinished[0]}: run again")


def run_groups(
    work: Callable[[dict[str, Any]], None],
    settings: Sequence[dict[str, Any]],
    workers: int,
    group: Group,
    directory: Path,
    name: str,
    on_event: Callable[[Any], None],
) -> None:
    """Call ``work`` in every worker of Ray Train groups that run at once; when a worker is lost or raises, its group starts again, up to
    three times.

    Args:
        work: called with its group's settings and two more: ``events``, a queue to the driver, and ``threads``, torch threads for a worker.
        settings: what the workers need; for each item there is a group.
        workers: size of each group.
        group: what each worker takes.
        directory: where Ray Train keeps its own records.
        name: of the groups, for those records.
        on_event: called in the driver with everything that is put into the queue, in order for each worker.

    Raises:
        Exception: Ray Train's, after the last attempt of a group; the other groups have come to their end.
    """
    events = Queue(actor_options={"num_cpus": 0})
    outcome: list[BaseException] = []
    threads = []
    for number, values in enumerate(settings):
        trainer = TorchTrainer(
            work,
            train_loop_config={**values, "events": events, "threads": max(1, round(group.cpus))},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=group.gpus > 0,
                resources_per_worker={"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}),
            ),
            run_config=RunConfig(
                name=name if len(settings) == 1 else f"{name}-{number}",
                **records_in(directory),
                failure_config=FailureConfig(max_failures=3),
            ),
        )
        threads.append(threading.Thread(target=_keep_error, args=(trainer.fit, outcome), daemon=True))
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) or not events.empty():
            try:
                event = events.get(timeout=0.5)
            except Empty:
                continue
            on_event(event)
    finally:
        events.shutdown(force=True)
    if outcome:
        raise outcome[0]


def worker_device() -> torch.device:
    """This worker's device: its GPU if its group has any, with products in TF32, which convolutions use by default."""
    device = get_device()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


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


def _try_run(spec: RunSpec, device: torch.device, world: World, events: Queue) -> Exception | None:
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


def _keep_error(function: Callable[[], Any], outcome: list[BaseException]) -> None:
    try:
        function()
    except BaseException as error:  # it is raised again in the caller's thread
        outcome.append(error)
