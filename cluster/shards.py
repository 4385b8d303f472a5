"""Shards, exactly once: part files that belong to one plan, and receipts for them."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from csm import storage, tables
from csm.locations import local

KEY, ROWS = "csm.key", "csm.rows"


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a finished part file; the images stay where they are.

    ``part`` is "mixed" or the annotator's name, ``seconds`` how long the worker that made it was busy with it (writing, which goes on
    beside the next shard, is not counted for images), ``node`` where that was.
    """

    part: str
    shard: int
    rows: int
    checksum: str
    seconds: float
    node: str


def part_path(directory: Path, shard: int) -> Path:
    """File of a shard below ``directory``."""
    return directory / f"part-{shard:08d}.parquet"


def write_part(frame: pl.DataFrame, directory: Path, shard: int, schema: tables.Schema, key: str) -> str:
    """Write the part file of ``shard`` atomically, marked with ``key``, and return its checksum."""
    path = part_path(directory, shard)
    tables.write(frame, path, schema, {KEY: key, ROWS: str(len(frame))})
    return storage.file_digest(path)


def finished_shards(directory: Path, key: str, rows: dict[int, int]) -> set[int]:
    """Shards of the plan that have a whole part file made under ``key`` with the planned number of rows.

    Args:
        directory: of the part files.
        key: fingerprint of everything the part's content depends on.
        rows: shard -> planned rows.
    """
    finished = set()
    for shard, count in rows.items():
        footer = tables.metadata(part_path(directory, shard))
        if footer is not None and footer.get(KEY) == key and footer.get(ROWS) == str(count):
            finished.add(shard)
    return finished


def plan_shards(plan: Path) -> dict[int, int]:
    """Shard -> rows of the plan, in order."""
    counts = pl.scan_parquet(local(plan)).group_by("shard").len().sort("shard").collect()
    return dict(zip(counts["shard"].to_list(), counts["len"].to_list(), strict=True))


def read_plan(plan: Path, shard: int) -> pl.DataFrame:
    """The rows of one shard, in plan order; only the row groups that hold it are read."""
    return tables.check(pl.scan_parquet(local(plan)).filter(pl.col("shard") == shard).collect(), tables.PLAN, str(plan))
