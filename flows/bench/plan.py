"""bench plan: writing a plan of millions of rows on one core, and finding one shard of it."""

import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cluster.shards import plan_shards, read_plan
from csm.pairs import all_pairs
from csm.planning import PlanConfig, write_plan
from flows.bench.clock import peak_mib

CLASSES, RATIOS = 1000, 8
READS = 5


def plan(rows: int = 10_000_000) -> dict[str, Any]:
    """Write a plan of at least ``rows`` rows in a process of its own that has one core, and read shards of it back.

    The plan is that of all pairs of 1,000 classes, or of fewer classes where fewer are enough.

    Returns:
        rows, classes, pairs, sets, shards; seconds (``write_plan``: rows, ids, digest and file; imports are not counted), cpu_seconds of
        the same, rows_per_s; file_mib; shards_ms (``plan_shards``), read_ms (median of reading one shard); peak_mib (of the whole
        process, with its imports).
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure, rows).result()


def _measure(rows: int) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before polars starts its threads, which inherit it
    classes = min(CLASSES, math.ceil((1 + math.sqrt(1 + 8 * rows / RATIOS)) / 2))
    pairs = classes * (classes - 1) // 2
    config = PlanConfig(ratios=RATIOS, sets_per_pair=math.ceil(rows / (pairs * RATIOS)))
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        path = Path(folder) / "plan.parquet"
        started, worked = time.monotonic(), time.process_time()
        written, _ = write_plan(path, all_pairs(classes), "bench", "bench", config)
        seconds, cpu = time.monotonic() - started, time.process_time() - worked
        size = path.stat().st_size
        shards, shards_ms = _timed(lambda: plan_shards(path))
        reads = sorted(_timed(lambda n=n: read_plan(path, n))[1] for n in range(0, len(shards), math.ceil(len(shards) / READS)))
    return {
        "rows": written,
        "classes": classes,
        "pairs": pairs,
        "sets": config.sets_per_pair,
        "shards": len(shards),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "rows_per_s": round(written / seconds),
        "file_mib": round(size / 2**20, 1),
        "shards_ms": shards_ms,
        "read_ms": reads[len(reads) // 2],
        "peak_mib": peak_mib(),
    }


def _timed(function: Any) -> tuple[Any, float]:
    started = time.monotonic()
    result = function()
    return result, round(1000 * (time.monotonic() - started), 1)
