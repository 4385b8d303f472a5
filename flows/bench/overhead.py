"""bench overhead: what mixing through Ray Data costs, in time against a bare loop of the same work and in memory of the driver."""

import os
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster.mixing import MixJob, process_shards
from cluster.resources import Pool
from cluster.session import session
from cluster.shards import finished_shards, part_path, plan_shards, read_plan, write_part
from csm import tables
from csm.generators import load_generator
from csm.generators.config import GeneratorConfig
from csm.mixing import mix
from csm.planning import PlanConfig, make_plan
from csm.sampling import SamplerConfig
from flows.bench.clock import in_a_process, peak_mib
from flows.progress import task

SHAPE, CLASSES = (8, 8, 1), 10
SAMPLER = SamplerConfig(steps=10)
BATCH = 128
SHARD_ROWS = 360
SMALL_ROWS = 8  # of a shard, where only their number matters


def overhead(seconds: float = 60.0, shards: int = 200) -> dict[str, Any]:
    """Time of mixing through Ray Data (one actor) over a bare loop of the same shards in this process, one thread each.

    A random-weight generator of the demo's size mixes as many shards as the bare loop is expected to do in ``seconds``. Ray's time
    starts when the pool is asked for, so it holds the actor's start and the loading of the generator; joining Ray is stated apart.

    The driver's memory is that of two processes of their own, which mix ``shards`` and ten times as many small shards.

    Returns:
        rows, bare_s, ray_s, ratio (ray / bare), connect_s, identical (whether all images are byte-equal), load_before (processes that
        wanted to run in the minute before), cpus, shards, driver_peak_mib, driver_peak_mib_10x, driver_growth_mib.
    """
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        make_generator(root / "generator", (16, 32))
        generator = load_generator(root / "generator")
        write_shards(root / "plan.parquet", 1, SHARD_ROWS)
        started = time.monotonic()
        mix(read_plan(root / "plan.parquet", 0), generator, SHAPE, SAMPLER, BATCH)
        write_shards(root / "plan.parquet", max(2, round(seconds / (time.monotonic() - started))), SHARD_ROWS)
        rows = plan_shards(root / "plan.parquet")

        started = time.monotonic()
        with task("bare loop", len(rows)) as progress:
            for shard in rows:
                frame = mix(read_plan(root / "plan.parquet", shard), generator, SHAPE, SAMPLER, BATCH)
                write_part(frame, root / "bare", shard, tables.MIXED, "bench")
                progress.advance()
        bare = time.monotonic() - started

        job = mix_job(root, rows, SAMPLER)
        started = time.monotonic()
        with session("local"):
            connected = time.monotonic()
            with task("ray, one actor", len(rows)) as progress:
                process_shards(job, [], Pool(max_actors=1), Pool(), lambda receipt: progress.advance())
            spread = time.monotonic() - connected
        same = [tables.read(part_path(root / name, shard), tables.MIXED) for shard in rows for name in ("bare", "ray")]
        peaks = [in_a_process(_driver_peak, number) for number in (shards, 10 * shards)]
        return {
            "rows": sum(rows.values()),
            "bare_s": round(bare, 2),
            "ray_s": round(spread, 2),
            "ratio": round(spread / bare, 3),
            "connect_s": round(connected - started, 2),
            "identical": all(first.equals(second) for first, second in zip(same[::2], same[1::2], strict=True)),
            "load_before": round(load, 2),
            "cpus": len(os.sched_getaffinity(0)),
            "shards": shards,
            "driver_peak_mib": peaks[0],
            "driver_peak_mib_10x": peaks[1],
            "driver_growth_mib": peaks[1] - peaks[0],
        }


def _driver_peak(shards: int) -> int:
    """Peak resident memory in MiB of this process, when it is the driver that mixes ``shards`` small shards."""
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder, session("local"):
        root = Path(folder)
        make_generator(root / "generator", (4, 8))
        write_shards(root / "plan.parquet", shards, SMALL_ROWS)
        rows = plan_shards(root / "plan.parquet")
        with task(f"driver, {shards} shards", len(rows)) as progress:
            process_shards(
                mix_job(root, rows, SamplerConfig(steps=1)), [], Pool(max_actors=1), Pool(), lambda _: progress.advance()
            )
        finished = finished_shards(root / "ray", "bench", rows)
    if len(finished) != shards:
        raise RuntimeError(f"{shards - len(finished)} of {shards} shards were not mixed")
    return peak_mib()


def mix_job(root: Path, shards: Collection[int], sampler: SamplerConfig) -> MixJob:
    """``shards`` of the plan below ``root``, by the generator there."""
    return MixJob(
        plan=root / "plan.parquet",
        generator=root / "generator",
        mixed=root / "ray",
        key="bench",
        shape=SHAPE,
        sampler=sampler,
        batch_size=BATCH,
        shards=frozenset(shards),
    )


def make_generator(directory: Path, block_channels: tuple[int, ...]) -> None:
    """Write a UNet of random weights."""
    from csm.generators.unet import UNetGenerator, UNetSpec

    config = GeneratorConfig(block_channels=block_channels)
    torch.manual_seed(0)
    settings = {name: asdict(config)[name] for name in ("block_channels", "layers_per_block", "dropout")}
    UNetGenerator(UNetSpec(SHAPE, CLASSES, 0.5, **settings)).save(directory)


def write_shards(path: Path, shards: int, shard_rows: int) -> None:
    """A plan of at least ``shards`` whole shards, cut to them."""
    sets = -(-shards * shard_rows // (8 * CLASSES * (CLASSES - 1) // 2))
    plan = make_plan(CLASSES, "bench", "bench", PlanConfig(sets_per_pair=sets, shard_rows=shard_rows))
    tables.write(plan.filter(plan["shard"] < shards), path, tables.PLAN)
