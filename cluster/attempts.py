"""Who is at which shard since when: what is slow is seen, and a shard on which workers die is set aside."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from csm.planning import shard_name

TRIES = 3  # of a shard on which the worker's process dies
SLOW = 3.0  # times the usual seconds of a shard: it is told from then on


class Worker(NamedTuple):
    """A worker's process: the id of its node, the name of that host, its process id."""

    node: str
    host: str
    process: int


class Lag(NamedTuple):
    """A shard that takes longer than usual: the pool that is at it, where, and for how many seconds."""

    step: str
    shard: int
    host: str
    seconds: float


class Standing(NamedTuple):
    """What the pools are at.

    Attributes:
        working: shards that workers on living nodes are at.
        slowest: the one that takes longest, if that is much longer than usual.
        lost: workers that died in the middle of a shard.
        seconds: how long they had been at those.
        wanting: what the workers wait for: what the nodes that are left lack for one of each pool, or a run that goes first; "": nothing.
    """

    working: int
    slowest: Lag | None
    lost: int
    seconds: float
    wanting: str = ""


class Poison(NamedTuple):
    """A shard on which workers died again and again, on these hosts."""

    step: str
    shard: int
    hosts: tuple[str, ...]


class PoisonError(RuntimeError):
    """Shards that were given up, so that the others could be finished."""

    def __init__(self, poisons: Sequence[Poison]) -> None:
        shown = "; ".join(f"{poison.step} of {shard_name(poison.shard)}, on {', '.join(poison.hosts)}" for poison in poisons[:4])
        more = f"; and {len(poisons) - 4} more" if len(poisons) > 4 else ""
        super().__init__(f"{len(poisons)} shard(s) set aside, all others are finished: {TRIES} workers died ({shown}{more})")
        self.poisons = tuple(poisons)


class Attempts:
    """Actor beside the driver that is told of the beginning and the end of each shard's work.

    Ray Data tries a block again for ever. Here it is known which shard a lost process was at: one that was there ``TRIES`` times when its
    process died on a living node is given up. What a node's loss ended does not count. The results of shards are kept, so that a block that
    is tried again repeats none of them.
    """

    def __init__(self, alive: Callable[[], Collection[str]] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._alive = alive or living_nodes
        self._clock = clock
        self._open: dict[tuple[str, int], tuple[Worker, float]] = {}
        self._done: dict[tuple[str, int], bytes] = {}
        self._deaths: dict[tuple[str, int], list[Worker]] = {}
        self._usual: dict[str, float] = {}  # a pool's seconds for a shard, of which the later ones count more
        self._lost: set[Worker] = set()
        self._seconds = 0.0

    def begin(self, step: str, shard: int, worker: Worker, alone: bool) -> bytes | Poison | bool:
        """``worker`` wants to work on ``shard``, with nothing ``alone`` beside it in its process or not.

        Returns:
            the result, if it has one already; why it is given up; or whether to begin: if not, it must come again alone.
        """
        key = (step, shard)
        if key in self._done:
            return self._done[key]
        if key in self._open:
            self._lose(key)
        if deaths := self._deaths.get(key):
            alive = self._alive()
            counted = [death for death in deaths if death.node in alive]
            if len(counted) >= TRIES:
                return Poison(step, shard, tuple(death.host for death in counted))
            if counted and not alone:  # else what was beside it would be blamed too
                return False
        self._open[key] = (worker, self._clock())
        return True

    def end(self, step: str, shard: int, result: bytes) -> None:
        """The work that began ended, with ``result``."""
        self._done[step, shard] = result
        if (step, shard) not in self._open:
            return  # its node came back after it was thought lost
        seconds = self._clock() - self._open.pop((step, shard))[1]
        self._usual[step] = seconds if step not in self._usual else 0.8 * self._usual[step] + 0.2 * seconds

    def pause(self) -> None:
        """All workers are ended; what they are at is begun again later."""
        self._open.clear()

    def standing(self, alive: Collection[str]) -> Standing:
        """What is going on, on the nodes ``alive``."""
        for key in [key for key, (worker, _) in self._open.items() if worker.node not in alive]:
            self._lose(key)
        now, lags = self._clock(), []
        for (step, shard), (worker, begun) in self._open.items():
            if now - begun > SLOW * self._usual.get(step, float("inf")):
                lags.append(Lag(step, shard, worker.host, now - begun))
        slowest = max(lags, key=lambda lag: lag.seconds, default=None)
        return Standing(len(self._open), slowest, len(self._lost), self._seconds)

    def _lose(self, key: tuple[str, int]) -> None:
        worker, begun = self._open.pop(key)
        self._deaths.setdefault(key, []).append(worker)
        self._lost.add(worker)
        self._seconds += self._clock() - begun


def start_attempts() -> Any:
    """The handle of an ``Attempts`` on the node of the driver, which ends with it; who is cut off from there for a while asks again."""
    # Not a soft affinity: Ray puts an actor that takes no CPU on any node then, and the run would end with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Attempts).options(num_cpus=0, scheduling_strategy=here, max_task_retries=-1).remote()


def living_nodes() -> set[str]:
    """Ids of the cluster's nodes that are not lost."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
