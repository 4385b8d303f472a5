"""Shards, exactly once: part files that belong to one plan, and receipts for them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from csm import storage, tables
from csm.locations import local

KEY, ROWS = "csm.key", "csm.rows"
READERS = 32  # of footers at once, which is waiting for storage more than work


class Written(NamedTuple):
    """A part file as it was written."""

    checksum: str
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a finished part file; the images stay where they are.

    ``part`` is "mixed" or the annotator's name, ``seconds`` how long the worker that made it was busy with it (writing, which goes on
    beside the next shard, is not counted for images), ``node`` where that was; ``bytes`` and ``key`` are of the file.
    """

    part: str
    shard: int
    rows: int
    checksum: str
    seconds: float
    node: str
    bytes: int
    key: str


def part_path(directory: Path, shard: int) -> Path:
    """File of a shard below ``directory``."""
    return directory / f"part-{shard:08d}.parquet"


def write_part(frame: pl.DataFrame, directory: Path, shard: int, schema: tables.Schema, key: str) -> Written:
    """Write the part file of ``shard`` atomically, marked with ``key``."""
    path = part_path(directory, shard)
    tables.check(frame, schema, str(path))
    with storage.replacing(path) as temporary:  # read here: on a store it would have to be fetched
        tables.write_file(frame, temporary, {KEY: key, ROWS: str(len(frame))})
        return Written(storage.file_digest(temporary), temporary.stat().st_size)


def finished_shards(directory: Path, key: str, rows: Mapping[int, int]) -> set[int]:
    """Shards of the plan that have a whole part file made under ``key`` with the planned number of rows, by their footers.

    Args:
        directory: of the part files.
        key: fingerprint of everything the part's content depends on.
        rows: shard -> planned rows.
    """

    def is_finished(shard: int) -> bool:
        footer = tables.metadata(part_path(directory, shard))
        return footer is not None and footer.get(KEY) == key and footer.get(ROWS) == str(rows[shard])

    if len(rows) == 1:
        return set(filter(is_finished, rows))
    with ThreadPoolExecutor(READERS) as readers:
        return {shard for shard, finished in zip(rows, readers.map(is_finished, rows), strict=True) if finished}


def plan_shards(plan: Path, kind: str | None = None) -> dict[int, int]:
    """Shard -> rows of the plan, in order; of ``kind`` alone if it is given."""
    counts = tables.plan_rows(pl.scan_parquet(local(plan)), kind).group_by("shard").len().sort("shard").collect()
    return dict(zip(counts["shard"].to_list(), counts["len"].to_list(), strict=True))


def read_plan(plan: Path, shard: int) -> pl.DataFrame:
    """The rows of one shard, in plan order; only the row groups that hold it are read."""
    rows = tables.plan_rows(pl.scan_parquet(local(plan))).filter(pl.col("shard") == shard).collect()
    return tables.check(rows, tables.PLAN, str(plan))
