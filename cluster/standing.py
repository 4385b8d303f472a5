"""Watching pools from the driver: what they are at, and whether they can go on at all."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from cluster.attempts import Standing
from cluster.resources import Pool, wanting
from cluster.sharing import ahead

TICK_SECONDS = 2.0
PATIENCE_SECONDS = 300.0  # for nodes that are lost to come back, where those that are left do not do
STOP = signal.SIGUSR1  # SIGINT is blocked in what a Ray job starts, and ignored in what a shell starts behind itself


@contextmanager
def watching(attempts: Any, pools: Mapping[str, Pool], on_standing: Callable[[Standing], None]) -> Iterator[None]:
    """Tell ``on_standing``, from a thread, what the workers are at while the block runs, and once more at its end.

    Raises:
        RuntimeError: (in place of what the block was waiting for) nobody was at work for ``PATIENCE_SECONDS``, because the cluster lost
            nodes and has no place any more for a worker of each of ``pools``. Only where this is the main thread.
    """
    end, stuck = threading.Event(), []

    def ask() -> Standing:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        standing: Standing = ray.get(attempts.standing.remote({node["NodeID"] for node in nodes}))
        if (priority := ahead()) is not None:
            return standing._replace(wanting=f"a run of priority {priority} goes first")
        return standing._replace(wanting=wanting(pools, [node["Resources"] for node in nodes]))

    def watch() -> None:
        since = time.monotonic()
        while not end.wait(TICK_SECONDS):
            try:
                standing = ask()
            except ray.exceptions.RayError:
                return  # the cluster is gone: who reads the results hears of it
            on_standing(standing)
            if standing.working or not standing.wanting or ahead() is not None:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE_SECONDS:
                if is_main and not end.is_set():
                    stuck.append(standing.wanting)
                    signal.pthread_kill(caller, STOP)  # Ray Data would wait for ever
                return

    caller, is_main = threading.get_ident(), threading.current_thread() is threading.main_thread()
    if is_main:
        before = signal.signal(STOP, signal.default_int_handler)
    thread = threading.Thread(target=watch, name="csm-standing", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if stuck:
            raise RuntimeError(f"nodes were lost, {stuck[0]}; add nodes, then run the same command again to go on") from None
        raise
    finally:
        end.set()
        thread.join(TICK_SECONDS)
        if is_main:
            signal.signal(STOP, before)
    on_standing(ask())
