"""bench overhead: mixing through Ray Data against a bare loop of the same work."""

import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cluster.mixing import MixJob, process_shards
from cluster.resources import Pool
from cluster.session import session
from cluster.shards import part_path, plan_shards, read_plan, write_part
from csm import tables
from csm.generators import load_generator
from csm.generators.config import GeneratorConfig
from csm.mixing import mix
from csm.planning import PlanConfig, make_plan
from csm.sampling import SamplerConfig
from flows.progress import task

SHAPE, CLASSES = (8, 8, 1), 10
SAMPLER = SamplerConfig(steps=10)
BATCH = 128
SHARD_ROWS = 360


def overhead(seconds: float = 60.0) -> dict[str, Any]:
    """Time of mixing through Ray Data (one actor) over a bare loop of the same shards in this process, one thread each.

    A random-weight generator of the demo's size mixes as many shards as the bare loop is expected to do in ``seconds``. Ray's time
    starts when the pool is asked for, so it holds the actor's start and the loading of the generator; joining Ray is stated apart.

    Returns:
        rows, bare_s, ray_s, ratio (ray / bare), connect_s, identical (whether all images are byte-equal), driver_peak_mib.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        _make_generator(root / "generator")
        generator = load_generator(root / "generator")
        _write_plan(root / "plan.parquet", 1)
        started = time.monotonic()
        mix(read_plan(root / "plan.parquet", 0), generator, SHAPE, SAMPLER, BATCH)
        shards = max(2, round(seconds / (time.monotonic() - started)))
        _write_plan(root / "plan.parquet", shards)
        rows = plan_shards(root / "plan.parquet")

        started = time.monotonic()
        with task("bare loop", len(rows)) as progress:
            for shard in rows:
                frame = mix(read_plan(root / "plan.parquet", shard), generator, SHAPE, SAMPLER, BATCH)
                write_part(frame, root / "bare", shard, tables.MIXED, "bench")
                progress.advance()
        bare = time.monotonic() - started

        job = MixJob(
            plan=root / "plan.parquet",
            generator=root / "generator",
            mixed=root / "ray",
            key="bench",
            shape=SHAPE,
            sampler=SAMPLER,
            batch_size=BATCH,
            shards=frozenset(rows),
        )
        started = time.monotonic()
        with session("local"):
            connected = time.monotonic()
            with task("ray, one actor", len(rows)) as progress:
                process_shards(job, [], Pool(max_actors=1), Pool(), lambda receipt: progress.advance())
            spread = time.monotonic() - connected
        same = [tables.read(part_path(root / name, shard), tables.MIXED) for shard in rows for name in ("bare", "ray")]
        return {
            "rows": sum(rows.values()),
            "bare_s": round(bare, 2),
            "ray_s": round(spread, 2),
            "ratio": round(spread / bare, 3),
            "connect_s": round(connected - started, 2),
            "identical": all(first.equals(second) for first, second in zip(same[::2], same[1::2], strict=True)),
            "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def _make_generator(directory: Path) -> None:
    from csm.generators.unet import UNetGenerator, UNetSpec

    config = GeneratorConfig(block_channels=(16, 32))
    torch.manual_seed(0)
    settings = {name: asdict(config)[name] for name in ("block_channels", "layers_per_block", "dropout")}
    UNetGenerator(UNetSpec(SHAPE, CLASSES, 0.5, **settings)).save(directory)


def _write_plan(path: Path, shards: int) -> None:
    """A plan of at least ``shards`` whole shards, cut to them."""
    sets = -(-shards * SHARD_ROWS // (8 * CLASSES * (CLASSES - 1) // 2))
    plan = make_plan(CLASSES, "bench", "bench", PlanConfig(sets_per_pair=sets, shard_rows=SHARD_ROWS))
    tables.write(plan.filter(plan["shard"] < shards), path, tables.PLAN)
