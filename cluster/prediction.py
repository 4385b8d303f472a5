"""Trained classifiers on shift sets, a Ray task for each; the task reads the images and writes numbers beside the classifier."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ray
import torch
from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError

from cluster.groups import RETRIES
from cluster.resources import Group, group_size
from cluster.session import share
from csm.errors import InputError
from csm.shift_metrics import ShiftJob, is_measured, measure_shift

LOST = (LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)


class Measured(NamedTuple):
    """What the driver hears of a classifier: how many sets it was measured on, or what could not be used."""

    run: str
    sets: int
    error: InputError | None


def measure_shifts(
    jobs: Sequence[ShiftJob], group: Group, on_measured: Callable[[Measured], None], on_lost: Callable[[str], None]
) -> None:
    """Do every job that is not done, those of one run in one task, as many tasks at once as ``group`` has workers.

    Needs a Ray session. A task that is lost with its node or process starts again, up to three times; sets that it finished stay.

    Args:
        jobs: their files are on storage that every node sees.
        group: what a task takes (``resources.train``).
        on_measured: called in the driver for every run, as they are finished.
        on_lost: called in the driver with the name of a run whose task starts again.

    Raises:
        InputError: the tasks do not fit the cluster, or a file cannot be used; the other runs are finished first.
        Exception: whatever else a task raised.
    """
    todo: dict[str, list[ShiftJob]] = {}
    for job in jobs:
        if not is_measured(job):
            todo.setdefault(job.run, []).append(job)
    if not todo:
        return
    room = group_size(group, len(todo), share())
    threads, device = max(1, round(group.cpus)), "cuda" if group.gpus else "cpu"
    task = ray.remote(num_cpus=group.cpus, num_gpus=group.gpus, max_retries=0)(_measure_run)
    waiting = list(todo.values())
    running: dict[ray.ObjectRef, list[ShiftJob]] = {}
    failures: list[InputError] = []
    losses = Counter[str]()
    try:
        while waiting or running:
            while waiting and len(running) < room:
                mine = waiting.pop(0)
                running[task.remote(mine, threads, device)] = mine
            (done,), _ = ray.wait(list(running))
            mine = running.pop(done)
            try:
                measured: Measured = ray.get(done)
            except LOST:
                run = mine[0].run
                losses[run] += 1
                if losses[run] > RETRIES:
                    raise
                on_lost(run)
                waiting.append(mine)
                continue
            if measured.error is not None:
                failures.append(measured.error)
            else:
                on_measured(measured)
    finally:
        for reference in running:  # interrupted, or a task failed
            ray.cancel(reference)
    if failures:
        raise failures[0]


def _measure_run(jobs: Sequence[ShiftJob], threads: int, device: str) -> Measured:
    """Task: one classifier on its sets. An ``InputError`` travels as a value: Ray would add pages to its message."""
    torch.set_num_threads(threads)
    try:
        for job in jobs:
            measure_shift(job, device)
    except InputError as error:
        return Measured(jobs[0].run, 0, error)
    return Measured(jobs[0].run, len(jobs), None)
