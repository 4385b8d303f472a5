"""Mixing over an actor pool, and annotation behind it."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.annotation import AnnotateJob, AnnotateShards
from cluster.attempts import Standing
from cluster.ledger import part_name
from cluster.pools import ShardWorker, Step, Watch, make_receipt, run_steps
from cluster.resources import Pool
from cluster.shards import Receipt, Written, finished_shards, part_path, read_plan, write_part
from csm import storage, tables
from csm.generators import Generator, load_generator
from csm.generators.acceleration import accelerate
from csm.generators.guidance import set_guidance
from csm.mixing import GENERATED, start_mixing
from csm.precision import Precision
from csm.sampling import SamplerConfig
from csm.training_images import TrainingImages


@dataclass(frozen=True)
class MixJob:
    """What a mixing actor needs; all paths are on storage that every node sees.

    ``keys`` is kind -> key of its part files, for kinds that have another one than ``key``; ``real`` is the `real` table, for kinds that
    need it, ``strength`` is that of ``csm.mixing.mix`` and ``guidance`` the generator's, None: its own.
    """

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
    real: Path | None = None
    strength: float = 1.0
    guidance: float | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


class MixShards(ShardWorker):
    """Actor: plan shard -> part file of mixed images. Passes the shard's number on, with a receipt for the part.

    It is called in two threads: while one denoises, the other encodes and writes the images of the shard before.
    """

    def __init__(self, job: MixJob, threads: int, watch: Watch | None = None) -> None:
        super().__init__(threads, watch)
        self.job = job
        self._turn = threading.Lock()
        self._free = 0.0  # when the device was done with the shard before

    @cached_property
    def generator(self) -> Generator:
        # Loaded with the first shard: what goes wrong in an actor's __init__ reaches the driver only as pages of text.
        job = self.job
        generator = accelerate(load_generator(job.generator), job.device, job.precision, job.compiled)
        if job.guidance is not None:
            set_guidance(generator, job.guidance)
        return generator

    @cached_property
    def real(self) -> TrainingImages | None:
        return TrainingImages(self.job.real, self.job.shape) if self.job.real else None

    def work(self, shard: int) -> list[dict[str, Any]]:
        job = self.job
        if shard not in job.shards:
            return []
        plan = read_plan(job.plan, shard)
        kind = plan["kind"][0]
        part, key = part_name("mixed", kind), job.keys.get(kind, job.key)
        if finished_shards(job.mixed, key, {shard: len(plan)}):  # by a worker that died later, in the same block of shards
            path = part_path(job.mixed, shard)
            written = Written(storage.file_digest(path), path.stat().st_size)
            return [make_receipt(part, shard, len(plan), written, key, 0.0)]
        with self._turn:
            started = time.monotonic()
            generator = self.generator if kind in GENERATED else None
            finish = start_mixing(plan, generator, job.shape, job.sampler, job.batch_size, job.operator, self.real, job.strength)
        frame = finish()
        done = time.monotonic()
        seconds, self._free = max(0.0, done - max(started, self._free)), done
        written = write_part(frame, job.mixed, shard, tables.MIXED, key)
        return [make_receipt(part, shard, len(frame), written, key, seconds)]


def process_shards(
    mix_job: MixJob | None,
    annotate_jobs: Sequence[AnnotateJob],
    mix_pool: Pool,
    annotate_pool: Pool,
    on_receipt: Callable[[Receipt], None],
    on_standing: Callable[[Standing], None] = lambda standing: None,
) -> None:
    """Make the part files that are asked for; annotation of a shard starts as soon as that shard is mixed.

    Needs a Ray session. Every worker writes its part beside and renames it, so a retried shard replaces itself by the same rows. Raises as
    ``run_steps`` does.

    Args:
        mix_job: shards to mix, or None.
        annotate_jobs: shards to annotate; each must be mixed already or be in ``mix_job``.
        mix_pool, annotate_pool: sizes.
        on_receipt: called in the driver for every part file, as they are finished.
        on_standing: called in the driver, from another thread, every few seconds.
    """
    steps = []
    if mix_job:
        steps.append(Step("mix", MixShards, {"job": mix_job}, mix_pool, calls=2))
    if annotate_jobs:
        steps.append(Step("annotate", AnnotateShards, {"jobs": tuple(annotate_jobs)}, annotate_pool))
    shards = (mix_job.shards if mix_job else frozenset()).union(*(job.shards for job in annotate_jobs))
    run_steps(steps, sorted(shards), on_receipt, on_standing)
