"""Mixing and annotation over Ray Data: a shard's number goes through the actor pools, its images only through part files."""

import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data  # now: imported later, it would set the level of its loggers anew, after `session` has
import torch

from cluster.resources import Pool, pool_sizes
from cluster.shards import Receipt, finished_shards, part_path, read_plan, write_part
from csm import storage, tables
from csm.generators import Generator, load_generator
from csm.generators.acceleration import Precision, accelerate
from csm.mixing import start_mixing
from csm.reannotation import ANNOTATORS, Annotator, annotate
from csm.sampling import SamplerConfig


@dataclass(frozen=True)
class MixJob:
    """What a mixing actor needs; all paths are on storage that every node sees."""

    plan: Path
    generator: Path
    mixed: Path
    key: str
    shape: tuple[int, int, int]
    sampler: SamplerConfig
    batch_size: int
    shards: frozenset[int]
    operator: str = "embedding"
    device: str = "cpu"
    precision: Precision = "auto"
    compiled: bool = False


@dataclass(frozen=True)
class AnnotateJob:
    """What an annotation actor needs for one annotator."""

    name: str
    plan: Path
    mixed: Path
    fitted: Path
    members: tuple[Path, ...]
    annotations: Path
    key: str
    shape: tuple[int, int, int]
    n_classes: int
    shards: frozenset[int]


class MixShards:
    """Actor: plan shard -> part file of mixed images. Passes the shard's number on, with a receipt for the part.

    It is called in two threads: while one denoises, the other encodes and writes the images of the shard before.
    """

    def __init__(self, job: MixJob, threads: int) -> None:
        torch.set_num_threads(threads)
        self.job = job
        self._turn = threading.Lock()
        self._free = 0.0  # when the device was done with the shard before

    @cached_property
    def generator(self) -> Generator:
        # Loaded with the first shard: what goes wrong in an actor's __init__ reaches the driver only as pages of text.
        job = self.job
        return accelerate(load_generator(job.generator), job.device, job.precision, job.compiled)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        return _each_shard(batch, self._mix)

    def _mix(self, shard: int) -> list[dict[str, Any]]:
        job = self.job
        if shard not in job.shards:
            return []
        plan = read_plan(job.plan, shard)
        if finished_shards(job.mixed, job.key, {shard: len(plan)}):  # by a worker that died later, in the same block of shards
            return [_receipt("mixed", shard, len(plan), storage.file_digest(part_path(job.mixed, shard)), 0.0)]
        with self._turn:
            started = time.monotonic()
            finish = start_mixing(plan, self.generator, job.shape, job.sampler, job.batch_size, job.operator)
        frame = finish()
        done = time.monotonic()
        seconds, self._free = max(0.0, done - max(started, self._free)), done
        checksum = write_part(frame, job.mixed, shard, tables.MIXED, job.key)
        return [_receipt("mixed", shard, len(frame), checksum, seconds)]


class AnnotateShards:
    """Actor: part file of mixed images -> one part file of annotations for each annotator; the images are read once."""

    def __init__(self, jobs: Sequence[AnnotateJob], threads: int) -> None:
        torch.set_num_threads(threads)
        self.jobs = jobs

    @cached_property
    def annotators(self) -> list[Annotator]:
        return [ANNOTATORS[job.name].load(job.fitted, job.members) for job in self.jobs]

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        return _each_shard(batch, self._annotate)

    def _annotate(self, shard: int) -> list[dict[str, Any]]:
        wanted = [(job, annotator) for job, annotator in zip(self.jobs, self.annotators, strict=True) if shard in job.shards]
        if not wanted:
            return []
        plan = read_plan(wanted[0][0].plan, shard)
        mixed = tables.read(part_path(wanted[0][0].mixed, shard), tables.MIXED)
        receipts = []
        for job, annotator in wanted:
            started = time.monotonic()
            frame = annotate(plan, mixed, annotator, job.shape, job.n_classes)
            checksum = write_part(frame, job.annotations, shard, tables.annotations(job.n_classes), job.key)
            receipts.append(_receipt(job.name, shard, len(frame), checksum, time.monotonic() - started))
        return receipts


def process_shards(
    mix_job: MixJob | None,
    annotate_jobs: Sequence[AnnotateJob],
    mix_pool: Pool,
    annotate_pool: Pool,
    on_receipt: Callable[[Receipt], None],
) -> None:
    """Make the part files that are asked for; annotation of a shard starts as soon as that shard is mixed.

    Needs a Ray session. Every worker writes its part beside and renames it, so a retried shard replaces itself by the same rows.

    Args:
        mix_job: shards to mix, or None.
        annotate_jobs: shards to annotate; each must be mixed already or be in ``mix_job``.
        mix_pool, annotate_pool: sizes.
        on_receipt: called in the driver for every part file, as they are finished.

    Raises:
        InputError: the pools do not fit the cluster, or an input of a shard cannot be used.
        Exception: whatever else the work on a shard raised.
    """
    pools = ({"mix": mix_pool} if mix_job else {}) | ({"annotate": annotate_pool} if annotate_jobs else {})
    sizes = pool_sizes(pools, ray.cluster_resources())
    shards = sorted((mix_job.shards if mix_job else frozenset()).union(*(job.shards for job in annotate_jobs)))
    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # bytes: what an actor yields for a shard goes on at once, not with the rest of its block
    rows = pa.Table.from_pylist([{"shard": shard, "receipts": [], "failure": None} for shard in shards], schema=_SCHEMA)
    length = block_length(len(shards), max(most for _, most in sizes.values()))
    data = ray.data.from_arrow([rows.slice(start, length) for start in range(0, len(rows), length)])
    if mix_job:
        data = _through(data, MixShards, {"job": mix_job, "threads": _threads(mix_pool)}, mix_pool, sizes["mix"], calls=2)
    if annotate_jobs:
        arguments = {"jobs": tuple(annotate_jobs), "threads": _threads(annotate_pool)}
        data = _through(data, AnnotateShards, arguments, annotate_pool, sizes["annotate"])
    for row in data.iter_rows():
        for receipt in row["receipts"]:
            on_receipt(Receipt(**receipt))
        if row["failure"] is not None:
            raise pickle.loads(row["failure"])


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


def block_length(shards: int, actors: int) -> int:
    """Shards of a block, which one actor takes as a whole.

    Ray's driver pays some milliseconds and some 50 KiB for each block that waits, so there are at most some hundred, but enough of
    them for every actor that all are busy to the end.
    """
    return -(-shards // max(256, 16 * actors))


def _each_shard(batch: pa.Table, work: Callable[[int], list[dict[str, Any]]]) -> Iterator[pa.Table]:
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


def _through(data: Any, actor: type, arguments: dict[str, Any], pool: Pool, size: tuple[int, int], calls: int = 1) -> Any:
    """Send ``data`` through a pool of ``actor``, a block a call, ``calls`` of them at once in every actor."""
    least, most = size
    strategy = ray.data.ActorPoolStrategy(
        min_size=least,
        max_size=most,
        initial_size=most,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=calls > 1,
    )
    return data.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=strategy,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )


def _threads(pool: Pool) -> int:
    return max(1, round(pool.cpus))


def _receipt(part: str, shard: int, rows: int, checksum: str, seconds: float) -> dict[str, Any]:
    receipt = Receipt(part, shard, rows, checksum, round(seconds, 4), _node())
    return dict(receipt.__dict__)


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())
