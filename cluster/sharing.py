"""Several runs on one cluster: while one of higher priority is there, the others wait.

Ray itself knows no priority of a job. Here each run tells a common actor, as long as it lives, that it is there.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

BEAT_SECONDS = 3.0
LOST_SECONDS = 20.0  # after which a run that was not heard of is gone
NAME, NAMESPACE = "csm-runs", "csm"


class Runs:
    """Actor that all runs on a cluster share: who is there, and with which priority."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._runs: dict[str, tuple[int, float]] = {}  # name -> priority, when it was last heard of

    def report(self, name: str, priority: int) -> int | None:
        """The run ``name`` is there; returns the highest priority of the others, if that is above its own."""
        now = self._clock()
        self._runs[name] = (priority, now)
        self._runs = {name: (each, heard) for name, (each, heard) in self._runs.items() if now - heard <= LOST_SECONDS}
        highest = max(each for each, _ in self._runs.values())
        return highest if highest > priority else None

    def leave(self, name: str) -> None:
        """The run ``name`` has ended."""
        self._runs.pop(name, None)


_ahead: list[int | None] = [None]  # of the run that is present, last: the priority that goes first


@contextmanager
def present(priority: int) -> Iterator[None]:
    """Be among the runs of the cluster for the length of the block, in a Ray session."""
    name, end = ray.get_runtime_context().get_job_id(), threading.Event()

    def beat() -> None:
        # A registry that was lost with its node is made again by whoever comes first, and hears of the others soon.
        with suppress(ray.exceptions.RayError, ValueError, ConnectionError):
            _ahead[-1] = ray.get(_registry().report.remote(name, priority), timeout=LOST_SECONDS)

    def beats() -> None:
        while not end.wait(BEAT_SECONDS):
            beat()

    _ahead.append(None)
    beat()
    thread = threading.Thread(target=beats, name="csm-present", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(BEAT_SECONDS)
        _ahead.pop()
        with suppress(ray.exceptions.RayError, ValueError, ConnectionError):
            _registry().leave.remote(name)


def ahead() -> int | None:
    """The priority of a run that goes first, or None if it is this one's turn."""
    return _ahead[-1]


def await_turn() -> None:
    """Wait while a run of higher priority is there."""
    while ahead() is not None:
        time.sleep(BEAT_SECONDS)


def _registry() -> Any:
    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
    }
    return ray.remote(Runs).options(**options).remote()
