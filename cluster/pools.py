"""Actor pools on Ray Data: a shard's number goes through them, what belongs to the shard only through files."""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.data  # now: imported later, it would set the level of its loggers anew, after `session` has

from cluster.resources import Pool, pool_sizes
from cluster.shards import Receipt

_RECEIPT = pa.struct(
    [
        ("part", pa.string()),
        ("shard", pa.int64()),
        ("rows", pa.int64()),
        ("checksum", pa.string()),
        ("seconds", pa.float64()),
        ("node", pa.string()),
    ]
)
_SCHEMA = pa.schema([("shard", pa.int64()), ("receipts", pa.list_(_RECEIPT)), ("failure", pa.binary())])


class Step(NamedTuple):
    """A pool that every shard goes through.

    Attributes:
        name: of the pool in the configuration, ``resources.NAME``.
        actor: class whose instances give ``each_shard`` of what they are called with.
        arguments: of its constructor, besides ``threads``.
        pool: size.
        calls: at once in every actor, each in a thread of its own.
    """

    name: str
    actor: type
    arguments: dict[str, Any]
    pool: Pool
    calls: int = 1


def run_steps(steps: Sequence[Step], shards: Sequence[int], on_receipt: Callable[[Receipt], None]) -> None:
    """Send every shard through the pools of ``steps``, one after the other; no shard waits for another one.

    Needs a Ray session.

    Raises:
        InputError: the pools do not fit the cluster, or an input of a shard cannot be used.
        Exception: whatever else the work on a shard raised.
    """
    sizes = pool_sizes({step.name: step.pool for step in steps}, ray.cluster_resources())
    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # bytes: what an actor yields for a shard goes on at once, not with the rest of its block
    rows = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None} for shard in shards], schema=_SCHEMA)
    length = block_length(len(shards), max(most for _, most in sizes.values()))
    data = ray.data.from_arrow([rows.slice(start, length) for start in range(0, len(rows), length)])
    for step in steps:
        data = _through(data, step, sizes[step.name])
    for row in data.iter_rows():
        for receipt in row["receipts"]:
            on_receipt(Receipt(**receipt))
        if row["failure"] is not None:
            raise pickle.loads(row["failure"])


def block_length(shards: int, actors: int) -> int:
    """Shards of a block, which one actor takes as a whole.

    Ray's driver pays some milliseconds and some 50 KiB for each block that waits, so there are at most some hundred, but enough of
    them for every actor that all are busy to the end.
    """
    return -(-shards // max(256, 16 * actors))


def each_shard(batch: pa.Table, work: Callable[[int], list[dict[str, Any]]]) -> Iterator[pa.Table]:
    """Every row of ``batch``, with the receipts of ``work(shard)``, as soon as that is done.

    What it raises travels to the driver as a value: Ray Data would wrap it in an exception of its own, without the cause, and log pages.
    """
    for row in batch.to_pylist():
        if row["failure"] is None:
            try:
                row["receipts"] += work(row["shard"])
            except Exception as error:
                error.add_note(traceback.format_exc())  # for --debug
                row["failure"] = pickle.dumps(error)
        yield pa.Table.from_pylist([row], schema=_SCHEMA)


def make_receipt(part: str, shard: int, rows: int, checksum: str, seconds: float) -> dict[str, Any]:
    """The fields of a ``Receipt`` of this actor."""
    receipt = Receipt(part, shard, rows, checksum, round(seconds, 4), _node())
    return dict(receipt.__dict__)


def _through(data: Any, step: Step, size: tuple[int, int]) -> Any:
    """Send ``data`` through the pool of ``step``, a block a call."""
    least, most = size
    strategy = ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        initial_size=most,
        max_concurrent_calls_per_actor=step.calls,
        enable_true_multi_threading=step.calls > 1,
    )
    return data.map_batches(
        step.actor,
        fn_constructor_kwargs={**step.arguments, "threads": max(1, round(step.pool.cpus))},
        batch_size=None,
        batch_format="pyarrow",
        compute=strategy,
        num_cpus=step.pool.cpus,
        num_gpus=step.pool.gpus,
    )


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())
