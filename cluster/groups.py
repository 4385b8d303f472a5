"""Ray Train worker groups that start again, as large as the cluster then allows, when a worker is lost."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, PreemptionError, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.resources import Group, group_size
from cluster.session import records_in, share
from csm.errors import InputError

FAILED = "a worker failed"  # reason of a setback that is not the loss of a worker
RETRIES = 3  # losses one after the other in which nothing new was done
WAIT_SECONDS = 600.0  # for nodes to come back


class Setback(NamedTuple):
    """What the driver hears when a group starts again or cannot start yet.

    Attributes:
        reason: in a few words; ``FAILED`` if a worker raised.
        workers: that were lost.
        counts: as one of few tries: something broke that may break again.
    """

    reason: str
    workers: int = 0
    counts: bool = True


class Delay(NamedTuple):
    """A training that goes on after a loss.

    Attributes:
        step: (or epoch) that it goes on from; 0: from its beginning.
        repeated: seconds of work that are done again.
        late: seconds by which it is later than it would have been.
    """

    step: int
    repeated: float
    late: float


class Pace:
    """When the steps (or epochs) of one training were first heard of, and so what a loss costs it."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}
        self.interrupted = False

    def interrupt(self) -> None:
        """A worker was lost: what is heard next comes from another try."""
        self.interrupted = bool(self.times)

    def hear(self, step: int, now: float | None = None) -> Delay | None:
        """``step`` was done, now or at ``now`` (seconds); after a loss, with what that cost."""
        now = time.monotonic() if now is None else now
        delay = self._delay(step, now) if self.interrupted else None
        self.interrupted = False
        self.times.setdefault(step, now)
        return delay

    def _delay(self, step: int, now: float) -> Delay:
        last = max(self.times)
        before = max((known for known in self.times if known < step), default=step)  # the first that was heard took no time here
        if step in self.times:
            return Delay(step - 1, self.times[last] - self.times[before], now - self.times[step])
        usual = self.times[last] - self.times.get(last - 1, self.times[last])
        return Delay(step - 1, 0.0, max(0.0, now - self.times[last] - usual))


def run_groups(
    work: Callable[[dict[str, Any]], None],
    count: int,
    prepare: Callable[[int, bool], tuple[int, dict[str, Any]]],
    group: Group,
    directory: Path,
    name: str,
    on_event: Callable[[Any], bool],
    on_setback: Callable[[int, Setback], None],
) -> None:
    """Call ``work`` in every worker of ``count`` Ray Train groups that run at once.

    When a worker is lost or raises, its group starts again: as often as there was something new in between, but at most three times
    without. If there is no room for it, it waits ten minutes for nodes.

    Args:
        work: called with its group's settings and two more: ``events``, a way to the driver, and ``threads``, torch threads for a worker.
        count: of groups.
        prepare: (number of a group, whether it starts again) -> its workers and settings, asked before each try; 0 workers: it has
            nothing left to do. Raises ``InputError`` if they do not fit the cluster.
        group: what each worker takes.
        directory: where Ray Train keeps its own records.
        name: of the groups, for those records.
        on_event: called in the driver with everything that workers put into ``events``, in order for each worker, and nothing from
            workers that were given up; gives whether that was new, and not something that was lost and done again.
        on_setback: called in the driver with the number of a group before it starts again.

    Raises:
        InputError: the workers do not fit the cluster.
        Exception: Ray Train's, after the last try of a group; the other groups have come to their end.
    """
    # On the driver's node: with another one it could be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def start(number: int, again: bool) -> None:
        workers, settings = prepare(number, again)
        if workers == 0:
            return
        key = (number, time.monotonic_ns())
        trainer = TorchTrainer(
            work,
            train_loop_config={**settings, "events": Events(queue, key), "threads": max(1, round(group.cpus))},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=group.gpus > 0,
                resources_per_worker={"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}),
            ),
            run_config=RunConfig(
                name=name if count == 1 else f"{name}-{number}",
                **records_in(directory),
                # Its own tries would all be of this size, though there may be less room or more.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        tries[number] = _Try(trainer.fit, key)

    def start_again(number: int) -> None:
        try:
            start(number, again=True)
            waiting.pop(number, None)
        except InputError as error:
            if number not in waiting:
                waiting[number] = time.monotonic() + WAIT_SECONDS
                on_setback(number, Setback(f"waiting for nodes ({error})", counts=False))
            elif time.monotonic() > waiting[number]:
                errors.append(error)
                del waiting[number]

    errors: list[BaseException] = []
    tries: dict[int, _Try] = {}
    failures = dict.fromkeys(range(count), 0)
    waiting: dict[int, float] = {}  # groups without room, and until when they wait for nodes
    try:
        for number in range(count):
            start(number, again=False)
        while tries or waiting:
            ended = [number for number, attempt in tries.items() if not attempt.is_alive()]
            try:
                key, item = queue.get(timeout=0.01 if ended else 0.5)
                if key[0] in tries and tries[key[0]].key == key and on_event(item):
                    failures[key[0]] = 0
                continue
            except Empty:
                pass  # all was heard that those said which ended before
            for number in ended:
                error = tries.pop(number).error
                if error is None:
                    continue
                setback = _setback(error)
                failures[number] += setback is not None and setback.counts
                if setback is None or failures[number] > RETRIES:
                    errors.append(error)
                else:
                    on_setback(number, setback)
                    start_again(number)
            for number in list(waiting):
                start_again(number)
    finally:
        queue.shutdown(force=True)
    if errors:
        raise errors[0]


class Events(NamedTuple):
    """A worker's way to the driver. ``key``: number of its group, and which try it belongs to."""

    queue: Queue
    key: tuple[int, int]

    def put(self, item: Any) -> None:
        self.queue.put((self.key, item))


def workers_now(group: Group, jobs: int, again: bool, name: str = "train") -> int:
    """As ``group_size`` of ``resources.NAME``; for a group that starts ``again``, fewer than it asks for will do.

    Raises:
        InputError: they do not fit the cluster; not a single one, if it starts again.
    """
    room = group_size(replace(group, workers=0) if again else group, jobs, share(), name)
    return min(room, group.workers or room)


def worker_device() -> torch.device:
    """This worker's device: its GPU if its group has any, with products in TF32, which convolutions use by default."""
    device = get_device()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


class _Try(threading.Thread):
    """One life of a worker group; ``error``: by which it ended."""

    def __init__(self, fit: Callable[[], Any], key: tuple[int, int]) -> None:
        super().__init__(daemon=True)
        self.fit, self.key = fit, key
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.fit()
        except BaseException as error:  # it is raised again in the caller's thread
            self.error = error


def _setback(error: BaseException) -> Setback | None:
    """What ended a group; None if another try would end the same way."""
    if isinstance(error, RayActorError):  # of Ray Train's process that leads the workers, which end with it
        return Setback(describe_loss([str(error)], "the controller"))
    if isinstance(error, PreemptionError):
        return Setback("a node is taken away", counts=False)
    if isinstance(error, ControllerError):
        kind = type(error.controller_failure).__name__
        if kind == "WorkerGroupStartupTimeoutError":  # the cluster is smaller than was known, or others have it
            return Setback("waiting for room for its workers", counts=False)
        return Setback("a worker was lost while it started") if kind == "WorkerGroupStartupFailedError" else None
    if not isinstance(error, WorkerGroupError):
        return None
    causes = [getattr(failure, "health_check_failure", failure) for failure in error.worker_failures.values()]
    lost = [str(cause) for cause in causes if isinstance(cause, RayActorError)]
    return Setback(describe_loss(lost), len(lost)) if lost else Setback(FAILED)


def describe_loss(messages: Sequence[str], one: str = "a worker") -> str:
    """What Ray's messages of dead actors come to, in a few words; ``one``: what a single one is."""
    hosts = sorted({match[1] for text in messages if (match := re.search(r"^\tip: (\S+)$", text, re.MULTILINE))})
    where = f" on {', '.join(hosts)}" if hosts else ""
    count = f"{len(messages)} workers" if len(messages) > 1 else one
    if any("node has died" in text for text in messages):
        return f"{count}{where} lost with the node"
    return f"{count}{where} lost (killed, or out of memory)"
