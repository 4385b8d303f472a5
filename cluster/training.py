"""Many trainings in one Ray Train worker group."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from cluster.resources import Group, group_size
from csm.errors import InputError
from csm.runs import RunSpec, fit_run, is_finished


class RunEvent(NamedTuple):
    """What the driver hears of a training: an epoch's values, that it is done, or why it failed."""

    run: str
    kind: Literal["epoch", "done", "failed"]
    epoch: int
    values: dict[str, float]
    error: str


class TrainingError(RuntimeError):
    """Some of many trainings failed; ``errors``: run -> its error."""

    def __init__(self, errors: dict[str, str], total: int) -> None:
        run, error = next(iter(errors.items()))
        super().__init__(f"{len(errors)} of {total} trainings failed; {run}: {error}")
        self.errors = errors


def fit_many(specs: Sequence[RunSpec], group: Group, directory: Path, name: str, on_event: Callable[[RunEvent], None]) -> None:
    """Train every unfinished run of ``specs`` in one group of workers, each run by one worker.

    A worker group costs seconds, so small trainings share one: worker r of n takes runs r, r + n, ... A lost worker restarts the
    group, up to three times: finished runs stay, the others go on from their last state. A run that fails is reported and leaves the
    others alone.

    Args:
        specs: the runs; their folders are on storage that every node sees.
        group: size of the group.
        directory: where Ray Train keeps its own records.
        name: of the group, for those records.
        on_event: called in the driver, in order for each run.

    Raises:
        InputError: the group does not fit the cluster.
        TrainingError: runs failed; the message names the first one and its error.
    """
    todo = [spec for spec in specs if not is_finished(spec)]
    if not todo:
        return
    errors: dict[str, str] = {}

    def hear(item: Any) -> None:
        event = RunEvent(*item)
        on_event(event)
        if event.kind == "failed":
            errors[event.run] = event.error

    workers = group_size(group, len(todo), ray.cluster_resources())
    run_group(_train_share, {"specs": todo}, workers, group, directory, name, hear)
    if errors:
        raise TrainingError(errors, len(todo))
    unfinished = [spec.run for spec in todo if not is_finished(spec)]
    if unfinished:
        raise RuntimeError(f"{len(unfinished)} of {len(todo)} trainings did not finish, among them {unfinished[0]}: run again")


def run_group(
    work: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    workers: int,
    group: Group,
    directory: Path,
    name: str,
    on_event: Callable[[Any], None],
) -> None:
    """Call ``work`` in every worker of one Ray Train group; when a worker is lost or raises, all start again, up to three times.

    Args:
        work: called with ``settings`` and two more: ``events``, a queue to the driver, and ``threads``, torch threads for a worker.
        settings: what the workers need.
        workers: size of the group.
        group: what each worker takes.
        directory: where Ray Train keeps its own records.
        name: of the group, for those records.
        on_event: called in the driver with everything that is put into the queue, in order for each worker.

    Raises:
        Exception: Ray Train's, after the last attempt.
    """
    events = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        work,
        train_loop_config={**settings, "events": events, "threads": max(1, round(group.cpus))},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=group.gpus > 0,
            resources_per_worker={"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}),
        ),
        run_config=RunConfig(name=name, storage_path=str(directory.absolute()), failure_config=FailureConfig(max_failures=3)),
    )
    outcome: list[BaseException] = []
    thread = threading.Thread(target=_keep_error, args=(trainer.fit, outcome), daemon=True)
    thread.start()
    try:
        while thread.is_alive() or not events.empty():
            try:
                event = events.get(timeout=0.5)
            except Empty:
                continue
            on_event(event)
    finally:
        events.shutdown(force=True)
    if outcome:
        raise outcome[0]


def _train_share(config: dict[str, Any]) -> None:
    """Worker: fit this rank's share of the runs."""
    torch.set_num_threads(config["threads"])
    events: Queue = config["events"]
    context = get_context()
    for spec in config["specs"][context.get_world_rank() :: context.get_world_size()]:
        run = spec.run
        try:
            fit_run(spec, lambda epoch, values, run=run: events.put((run, "epoch", epoch, values, "")))  # type: ignore[misc]
            events.put((run, "done", 0, {}, ""))
        except (InputError, FloatingPointError, ValueError, RuntimeError, OSError) as error:
            events.put((run, "failed", 0, {}, f"{type(error).__name__}: {error}"))


def _keep_error(function: Callable[[], Any], outcome: list[BaseException]) -> None:
    try:
        function()
    except BaseException as error:  # it is raised again in the caller's thread
        outcome.append(error)
