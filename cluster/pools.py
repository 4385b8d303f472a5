"""Actor pools on Ray Data: a shard's number goes through them, what belongs to the shard only through files."""

import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data  # now: imported later, it would set the level of its loggers anew, after `session` has
import torch

from cluster.attempts import Poison, PoisonError, Standing, Worker, start_attempts
from cluster.resources import Pool, pool_sizes
from cluster.session import share
from cluster.shards import Receipt, Written
from cluster.sharing import ahead, await_turn
from cluster.standing import watching

_RECEIPT = pa.struct(
    [
        ("part", pa.string()),
        ("shard", pa.int64()),
        ("rows", pa.int64()),
        ("checksum", pa.string()),
        ("seconds", pa.float64()),
        ("node", pa.string()),
        ("bytes", pa.int64()),
        ("key", pa.string()),
    ]
)
_SCHEMA = pa.schema([("shard", pa.int64()), ("receipts", pa.list_(_RECEIPT)), ("failure", pa.binary())])
IN_FLIGHT = 2  # blocks that an actor has at once: more would wait behind a slow one
STARTS = 2  # workers of a pool, one after the other, that may fail to start and are replaced; else the first would end the run
SHARES = 12  # of what is left, for each actor; with IN_FLIGHT, one that is five times slower is done before the others are


class Step(NamedTuple):
    """A pool that every shard goes through.

    Attributes:
        name: of the pool in the configuration, ``resources.NAME``.
        actor: its class.
        arguments: of its constructor, besides those of ``ShardWorker``.
        pool: size.
        calls: at once in every actor, each in a thread of its own.
    """

    name: str
    actor: type["ShardWorker"]
    arguments: dict[str, Any]
    pool: Pool
    calls: int = 1


class Watch(NamedTuple):
    """Where a worker says which shard it is at: the ``Attempts``, and the name and the calls of its step."""

    attempts: Any
    step: str
    calls: int


class ShardWorker:
    """Actor of a pool: does the ``work`` on each shard that it is sent and says so to the ``watch``; without one, to nobody."""

    def __init__(self, threads: int, watch: Watch | None = None) -> None:
        torch.set_num_threads(threads)
        self._watch = watch
        self._worker = Worker(_node(), socket.gethostname(), os.getpid()) if watch else None
        self._places = threading.Semaphore(watch.calls if watch else 1)
        self._taking_all = threading.Lock()

    def work(self, shard: int) -> list[dict[str, Any]]:
        """Make the parts of ``shard`` and return a receipt for each."""
        raise NotImplementedError

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Every row of ``batch``, with the receipts of ``work(shard)``, as soon as that is done.

        What it raises travels to the driver as a value: Ray Data would wrap it in an exception of its own, without the cause, and log
        pages.
        """
        for row in batch.to_pylist():
            if row["failure"] is None:
                receipts, row["failure"] = self._attempt(row["shard"])
                row["receipts"] += receipts
            yield pa.Table.from_pylist([row], schema=_SCHEMA)

    def _attempt(self, shard: int) -> tuple[list[dict[str, Any]], bytes | None]:
        """Receipts and the pickled failure, if there was one, of ``shard``: made now, or by a worker that was lost later."""
        if self._watch is None:
            return self._outcome(shard)
        attempts, step, calls = self._watch
        for alone in (False, True):
            with self._alone(calls) if alone else self._places:
                answer = ray.get(attempts.begin.remote(step, shard, self._worker, alone))
                if isinstance(answer, bytes):
                    receipts, failure = pickle.loads(answer)
                    return receipts, failure
                if isinstance(answer, Poison):
                    return [], pickle.dumps(answer)
                if answer:
                    outcome = self._outcome(shard)
                    ray.get(attempts.end.remote(step, shard, pickle.dumps(outcome)))
                    return outcome
        raise AssertionError("an attempt that is alone is never refused")

    def _outcome(self, shard: int) -> tuple[list[dict[str, Any]], bytes | None]:
        try:
            return self.work(shard), None
        except Exception as error:
            error.add_note(traceback.format_exc())  # for --debug
            return [], pickle.dumps(error)

    @contextmanager
    def _alone(self, calls: int) -> Iterator[None]:
        """Wait until no other shard is at work in this process, and let none begin."""
        with self._taking_all:
            for _ in range(calls):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(calls)


def run_steps(
    steps: Sequence[Step],
    shards: Sequence[int],
    on_receipt: Callable[[Receipt], None],
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> None:
    """Send every shard through the pools of ``steps``, one after the other; no shard waits for another one.

    Needs a Ray session. A lost worker's shards are done by another one. A shard on which a worker's process died three times is set aside.
    While a run of higher priority is there, the workers are ended and this one waits.

    Args:
        steps: the pools.
        shards: their numbers.
        on_receipt: called for every part file, as they are finished.
        on_standing: called every few seconds, from another thread, and once at the end.

    Raises:
        InputError: the pools do not fit the cluster, or an input of a shard cannot be used.
        PoisonError: after all others were finished.
        RuntimeError: nodes were lost, and for minutes those that are left could not hold a worker of each pool.
        Exception: whatever else the work on a shard raised.
    """
    pools = {step.name: step.pool for step in steps}
    pool_sizes(pools, share())
    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = STARTS
    context.target_max_block_size = 1  # bytes: what an actor yields for a shard goes on at once, not with the rest of its block
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # where IN_FLIGHT blocks for `calls` threads are enough
    left, poisons, attempts = dict.fromkeys(shards), [], start_attempts()
    with watching(attempts, pools, on_standing):
        while left:
            await_turn()
            sizes = pool_sizes(pools, share())
            with closing(_results(steps, list(left), sizes, attempts)) as rows:
                for row in rows:
                    for receipt in row["receipts"]:
                        on_receipt(Receipt(**receipt))
                    if row["failure"] is not None:
                        failure = pickle.loads(row["failure"])
                        if not isinstance(failure, Poison):
                            raise failure
                        poisons.append(failure)
                    left.pop(row["shard"])
                    if left and ahead() is not None:
                        break
            ray.get(attempts.pause.remote())
    if poisons:
        raise PoisonError(sorted(poisons))


def _results(
    steps: Sequence[Step], shards: Sequence[int], sizes: dict[str, tuple[int, int]], attempts: Any
) -> Iterator[dict[str, Any]]:
    """Rows of ``_SCHEMA`` for ``shards`` that went through all ``steps``, as they come; the workers are there until it is closed."""
    rows = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None} for shard in shards], schema=_SCHEMA)
    blocks, start = [], 0
    for length in block_lengths(len(shards), max(most for _, most in sizes.values())):
        blocks.append(rows.slice(start, length))
        start += length
    data = ray.data.from_arrow(blocks)
    for step in steps:
        data = _through(data, step, sizes[step.name][1], Watch(attempts, step.name, step.calls))
    yield from data.iter_rows()


def block_lengths(shards: int, actors: int) -> list[int]:
    """Shards of each block, which one actor takes as a whole: guided self-scheduling (Polychronopoulos and Kuck, 1987).

    Ray's driver pays some milliseconds and some 50 KiB for each block that waits, so at first there are many shards in one, though at most
    1/256 of all. Towards the end they shrink to single shards: then no actor, however slow, keeps what the others could do.
    """
    lengths, left, most = [], shards, -(-shards // 256)
    while left:
        lengths.append(max(1, min(most, left // (SHARES * actors))))
        left -= lengths[-1]
    return lengths


def make_receipt(part: str, shard: int, rows: int, written: Written, key: str, seconds: float) -> dict[str, Any]:
    """The fields of a ``Receipt`` of this actor for what was ``written`` under ``key``."""
    receipt = Receipt(part, shard, rows, written.checksum, round(seconds, 4), _node(), written.bytes, key)
    return dict(receipt.__dict__)


def _through(data: Any, step: Step, most: int, watch: Watch) -> Any:
    """Send ``data`` through the pool of ``step``, a shard a call (for pools with GPUs Ray Data wants to be told how many).

    Whatever ``min_actors`` is, the pool may shrink to one when others wait for its place: a pool that may not would hold, with nothing to
    do, what is left of a cluster after a node is lost.
    """
    strategy = ray.data.ActorPoolStrategy(
        min_size=1,
        max_size=most,
        initial_size=most,
        max_tasks_in_flight_per_actor=IN_FLIGHT,
        max_concurrent_calls_per_actor=step.calls,
        enable_true_multi_threading=step.calls > 1,
    )
    return data.map_batches(
        step.actor,
        fn_constructor_kwargs={**step.arguments, "threads": max(1, round(step.pool.cpus)), "watch": watch},
        batch_size=1,
        batch_format="pyarrow",
        compute=strategy,
        num_cpus=step.pool.cpus,
        num_gpus=step.pool.gpus,
    )


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())
