"""The ledger of a workspace: every receipt, and what is finished by them without a look into the part files.

In a folder it is one file, appended to. On a store, where nothing can be appended to, it is objects of about a MiB, the last of which is
put anew every few seconds. What a killed driver had not written down is found by the footers of those files alone.
"""

import io
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import polars as pl

from cluster.shards import Receipt, finished_shards, part_path
from csm.locations import is_remote, listing, store

LOG, CHUNKS = "receipts.jsonl", "receipts"
CHUNK_BYTES, PUT_SECONDS = 2**20, 5.0
NO_SHARD = -1  # of a line that says: from here on the part is made under another key

_SCHEMA = {
    "part": pl.String(),
    "shard": pl.Int64(),
    "rows": pl.Int64(),
    "checksum": pl.String(),
    "seconds": pl.Float64(),
    "node": pl.String(),
    "bytes": pl.Int64(),
    "key": pl.String(),
}


def read_receipts(root: Path) -> pl.DataFrame:
    """The receipts of the workspace at ``root``, with the fields of ``Receipt`` as columns, in the order in which they came.

    Those of versions that did not note bytes and key have null there. Half a line, as a kill leaves it, is left out.
    """
    text = _read_chunks(root / CHUNKS) if is_remote(root) else (root / LOG).read_bytes() if (root / LOG).is_file() else b""
    text = text[: text.rfind(b"\n") + 1]
    return pl.read_ndjson(io.BytesIO(text), schema=_SCHEMA) if text else pl.DataFrame(schema=_SCHEMA)


@contextmanager
def open_ledger(root: Path, keys: Mapping[str, str]) -> Iterator[Callable[[Receipt], None]]:
    """Give a function that adds a receipt; only one process may have the ledger of ``root`` open.

    Args:
        root: of the workspace.
        keys: part -> the key under which its files are made from now on.
    """
    before = read_receipts(root).select("part", "key").group_by("part", maintain_order=True).last()
    last = dict(before.iter_rows())
    with _chunks(root / CHUNKS) if is_remote(root) else _log(root / LOG) as append:
        for part, key in keys.items():
            if part in last and last[part] != key:  # before any such file is there: see ``known_parts``
                append(_line(Receipt(part, NO_SHARD, 0, "", 0.0, "", 0, key)), True)
        yield lambda receipt: append(_line(receipt), False)


def part_name(part: str, kind: str) -> str:
    """How receipts name the files of ``part`` with images of ``kind``; those of semantic mixtures are the part itself."""
    return part if kind == "semantic" else f"{part}/{kind}"


def part_bytes(directory: Path) -> dict[str, int]:
    """Name -> bytes of every part file in ``directory``, in one listing."""
    if is_remote(directory):
        return {name: size for name, (size, _) in listing(directory).items() if _is_part(name)}
    if not directory.is_dir():
        return {}
    with os.scandir(directory) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if _is_part(entry.name)}


def known_parts(receipts: pl.DataFrame, part: str, key: str) -> dict[int, tuple[int, int]]:
    """Shard -> rows and bytes of the files of ``part`` that were made under ``key``, by their last receipts.

    Only those count that came after every line of the part with another key: where it was begun under that one, a worker may have
    replaced a file whose receipt the driver never got, and files of equal length are no rarity.
    """
    of_part = receipts.with_row_index().filter(pl.col("part") == part)
    other = of_part.filter(pl.col("key").ne_missing(key))["index"]
    valid = of_part if other.is_empty() else of_part.filter(pl.col("index") > other[-1])
    return {shard: (rows, size) for shard, rows, size in valid.select("shard", "rows", "bytes").iter_rows()}


def finished_parts(
    receipts: pl.DataFrame, files: Mapping[str, int], part: str, directory: Path, key: str, rows: Mapping[int, int]
) -> set[int]:
    """Shards of the plan whose files are whole, made under ``key`` and with the planned number of rows.

    A file is known by its receipt and its length; only of one without a receipt, or of another length, is the footer read.

    Args:
        receipts: ``read_receipts`` of the workspace.
        files: ``part_bytes`` of ``directory``.
        part: as the receipts name it.
        directory: of the part files.
        key: fingerprint of everything that their content depends on.
        rows: shard -> planned rows.
    """
    known, finished, doubtful = known_parts(receipts, part, key), set(), {}
    for shard, count in rows.items():
        size = files.get(part_path(Path(), shard).name)
        if size is None:
            continue
        if known.get(shard) == (count, size):
            finished.add(shard)
        else:
            doubtful[shard] = count
    return finished | finished_shards(directory, key, doubtful)


def spent(receipts: pl.DataFrame, part: str, shards: Collection[int]) -> float:
    """Device-seconds of the last receipt for each of ``shards`` of ``part``."""
    seconds = dict(receipts.filter(pl.col("part") == part).select("shard", "seconds").iter_rows())
    return sum(seconds[shard] for shard in shards if shard in seconds)


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _line(receipt: Receipt) -> bytes:
    return json.dumps(asdict(receipt)).encode() + b"\n"


def _read_chunks(folder: Path) -> bytes:
    names = sorted(listing(folder))
    contents = store(folder).cat([str(folder / name) for name in names]) if names else {}
    return b"".join(contents[path] for path in sorted(contents))


@contextmanager
def _log(path: Path) -> Iterator[Callable[[bytes, bool], None]]:
    """Append lines to the file, on the disk before it goes on where asked. Half a line, as a kill or a full disk leaves it, is cut off."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("ab") as file:

        def append(line: bytes, at_once: bool) -> None:
            file.write(line)
            file.flush()
            if at_once:
                os.fsync(file.fileno())

        yield append


@contextmanager
def _chunks(folder: Path) -> Iterator[Callable[[bytes, bool], None]]:
    """Append lines to objects of the store below ``folder``, each put as a whole; their names are in the order of time."""
    text, name, put, waiting = bytearray(), "", 0.0, False

    def send() -> None:
        nonlocal name, put, waiting
        name = name or f"{time.time_ns():020d}.jsonl"
        (folder / name).write_bytes(bytes(text))
        put, waiting = time.monotonic(), False
        if len(text) >= CHUNK_BYTES:
            text.clear()
            name = ""

    def append(line: bytes, at_once: bool) -> None:
        nonlocal waiting
        text.extend(line)
        waiting = True
        if at_once or len(text) >= CHUNK_BYTES or time.monotonic() - put >= PUT_SECONDS:
            send()

    try:
        yield append
    finally:
        if waiting:
            send()
