"""Data-parallel training of one generator in a Ray Train worker group."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray.train import get_context

from cluster.groups import Delay, Pace, Setback, run_groups, worker_device, workers_now
from cluster.resources import Group
from csm.errors import InputError
from csm.generators.fitting import FitJob, OnStep, fit_job
from csm.world import World

EVENT_SECONDS = 0.5  # steps of so long go to the driver together


def fit_in_group(
    job: FitJob, group: Group, directory: Path, name: str, on_step: OnStep, on_loss: Callable[[Setback | Delay], None]
) -> None:
    """Train the generator of ``job`` with ``csm.generators.fitting.fit_job`` in a group of workers, on their GPUs if they have any.

    A lost worker restarts the group from the last state, smaller if there is no room for as many workers. Needs a Ray session.

    Args:
        job: what to train; its folders are on storage that every node sees.
        group: size of the group; 0 workers are as many as fit. One is the same as a direct call of ``fit_job``.
        directory: where Ray Train keeps its own records.
        name: of the group, for those records.
        on_step: called in the driver with (step, loss) for every step from 1, in order; a group that starts again tells them again.
        on_loss: called in the driver when the group starts again, and with what that cost when it goes on.

    Raises:
        InputError: the group does not fit the cluster, or the data or the state is missing or damaged.
        FloatingPointError: the loss is not finite.
        OSError: a worker could not write.
    """
    failures: list[Exception] = []
    pace = Pace()
    resumed = 0  # the step from which the latest try goes on; those before are told again at once

    def hear(event: list[tuple[int, float]] | Exception) -> bool:
        if isinstance(event, Exception):
            failures.append(event)
            return False
        new = bool(event) and event[-1][0] not in pace.times
        for step, loss in event:
            if step > resumed and (delay := pace.hear(step)) is not None:
                on_loss(delay)
            on_step(step, loss)
        return new

    def lose(number: int, setback: Setback) -> None:
        nonlocal resumed
        last, states = max(pace.times, default=0), job.config.checkpoint_steps
        resumed = last - last % states
        pace.interrupt()
        on_loss(setback)

    def prepare(number: int, again: bool) -> tuple[int, dict[str, Any]]:
        workers = workers_now(group, job.config.batch_size, again, "fit")
        if workers > 1 and 0 < group.gpus < 1:
            raise InputError(f"resources.fit.gpus: expected 0 or at least 1 for each of {workers} workers, got {group.gpus:g}")
        return workers, {"job": job}

    try:
        run_groups(_fit_share, 1, prepare, group, directory, name, hear, lose)
    except Exception as error:
        if failures:
            raise failures[-1] from error  # what a worker said is clearer than what Ray Train makes of it
        raise
    if failures and not isinstance(failures[-1], OSError):
        raise failures[-1]


def _fit_share(config: dict[str, Any]) -> None:
    """Worker: this rank's share of every batch."""
    torch.set_num_threads(config["threads"])
    device, context = worker_device(), get_context()
    events, steps, sent = config["events"], list[tuple[int, float]](), time.monotonic()

    def send() -> None:
        nonlocal sent
        events.put(steps.copy())
        steps.clear()
        sent = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        steps.append((step, loss))
        if time.monotonic() - sent >= EVENT_SECONDS:
            send()

    try:
        fit_job(config["job"], on_step, device, World(context.get_world_rank(), context.get_world_size()))
    except (InputError, FloatingPointError) as error:
        events.put(error)  # every rank gets here and returns, for another try would end the same way
    except OSError as error:
        events.put(error)
        raise  # the others wait for this rank: Ray Train stops them, and a full disk may be free by the next try
    finally:
        send()
