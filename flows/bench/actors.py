"""bench scale, actors: images per second of 1, 2, 4 mixing actors, and what the driver pays for it."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cluster.mixing import process_shards
from cluster.resources import Pool
from cluster.session import session
from cluster.shards import Receipt, plan_shards, read_plan
from csm.generators import load_generator
from csm.generators.gaussians import GaussianGenerator, GaussiansSpec
from csm.mixing import mix
from csm.sampling import SamplerConfig
from flows.bench.clock import in_a_process
from flows.bench.overhead import BATCH, CLASSES, SHAPE, make_generator, mix_job, write_shards
from flows.progress import say

HANDED = 0.02  # seconds, about, that a shard takes at least through Ray Data
WARM = 5  # the first 1/WARM of the receipts is not timed: actors start one after the other


class Case(NamedTuple):
    """A generator of random weights, which ``make`` writes to a folder, the rows of a shard, and the sampler."""

    make: Callable[[Path], None]
    shard_rows: int
    sampler: SamplerConfig


def _make_gaussians(directory: Path) -> None:
    size = math.prod(SHAPE)
    draws = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, size, generator=draws, dtype=torch.float64) / 4
    roots = torch.randn(CLASSES, size, size, generator=draws, dtype=torch.float64) / 16
    covariances = roots @ roots.mT + torch.eye(size, dtype=torch.float64) / 100
    priors = torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    GaussianGenerator(GaussiansSpec(SHAPE, CLASSES), means, covariances, priors).save(directory)


CASES = {
    "gaussians": Case(_make_gaussians, 720, SamplerConfig()),
    "unet": Case(lambda directory: make_generator(directory, (16, 32)), 360, SamplerConfig(steps=10)),
    "smallest shards": Case(_make_gaussians, 8, SamplerConfig(steps=1)),  # so that there is little to do but to hand them out
}


def actor_speed(case: str, actors: Sequence[int] = (1, 2, 4), seconds: float = 20.0) -> list[dict[str, Any]]:
    """Mix for about ``seconds`` with each number of actors, one thread each, in driver processes of their own.

    Args:
        case: a key of ``CASES``.
        actors: their numbers; the first is what efficiency is relative to.
        seconds: of each measurement.

    Returns:
        For each: case, actors, cores, images, shards (both of the time measured, after 1/5 of the receipts), seconds, images_per_s,
        shards_per_s, efficiency (of images per second and actor, where actors that share a core count as one: min(actors, cores)),
        driver_share (CPU time of the driver's process, user and system, over ``seconds``), driver_ms (of CPU for each shard).
    """
    cores = len(os.sched_getaffinity(0))
    one = max(HANDED, in_a_process(_shard_seconds, case))
    measured = []
    for count in actors:
        shards = max(2 * WARM * count, round(seconds * min(count, cores) / one))
        say(f"{case}: {count} actor(s), {shards} shards")
        measured.append(in_a_process(_measure, case, count, cores, shards))
    first = measured[0]
    alone = first["images_per_s"] / min(first["actors"], cores)
    return [{**row, "efficiency": round(row["images_per_s"] / alone / min(row["actors"], cores), 3)} for row in measured]


def _shard_seconds(case: str) -> float:
    """Of mixing one shard in this process, without Ray."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        make, rows, sampler = CASES[case]
        make(root / "generator")
        write_shards(root / "plan.parquet", 1, rows)
        plan, generator = read_plan(root / "plan.parquet", 0), load_generator(root / "generator")
        mix(plan.head(1), generator, SHAPE, sampler, BATCH)
        started = time.monotonic()
        mix(plan, generator, SHAPE, sampler, BATCH)
        return time.monotonic() - started


def _measure(case: str, actors: int, cores: int, shards: int) -> dict[str, Any]:
    make, shard_rows, sampler = CASES[case]
    seen: list[tuple[float, float, int]] = []  # time, CPU time of this process, and rows of each receipt

    def note(receipt: Receipt) -> None:
        seen.append((time.monotonic(), time.process_time(), receipt.rows))

    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder, session("local", max(actors, cores)):
        root = Path(folder)
        make(root / "generator")
        write_shards(root / "plan.parquet", shards, shard_rows)
        job = mix_job(root, plan_shards(root / "plan.parquet"), sampler)
        process_shards(job, [], Pool(min_actors=actors, max_actors=actors), Pool(), note)
    (started, worked, _), later = seen[len(seen) // WARM], seen[len(seen) // WARM + 1 :]
    seconds, cpu, images = later[-1][0] - started, later[-1][1] - worked, sum(rows for *_, rows in later)
    return {
        "case": case,
        "actors": actors,
        "cores": cores,
        "images": images,
        "shards": len(later),
        "seconds": round(seconds, 2),
        "images_per_s": round(images / seconds, 1),
        "shards_per_s": round(len(later) / seconds, 2),
        "driver_share": round(cpu / seconds, 4),
        "driver_ms": round(1000 * cpu / len(later), 3),
    }
