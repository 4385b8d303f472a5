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

TICK_SECONDS = 2.0
PATIENCE_SECONDS = 300.0  # for nodes that are lost to come back, where those that are left do not do


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
        return standing._replace(wanting=wanting(pools, [node["Resources"] for node in nodes]))

    def watch() -> None:
        since = time.monotonic()
        while not end.wait(TICK_SECONDS):
            try:
                standing = ask()
            except ray.exceptions.RayError:
                return  # the cluster is gone: who reads the results hears of it
            on_standing(standing)
            if standing.working or not standing.wanting:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE_SECONDS:
                if caller is threading.main_thread() and caller.ident:
                    stuck.append(standing.wanting)
                    signal.pthread_kill(caller.ident, signal.SIGINT)  # Ray Data would wait for ever
                return

    caller = threading.current_thread()
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
    on_standing(ask())
