"""The ledger in a folder and on a store. What it says is finished is compared with what every footer says."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest

from cluster import ledger, shards
from cluster.ledger import finished_parts, open_ledger, part_bytes, read_receipts, spent
from cluster.shards import Receipt, finished_shards, part_path, write_part
from csm import tables
from csm.locations import listing

ROWS = {0: 4, 1: 3, 2: 4, 3: 4}


def made(directory: Path, shard: int, key: str = "key", rows: int | None = None, part: str = "mixed", first: int = 0) -> Receipt:
    """Write a part file as a worker does; the receipt of it."""
    count = ROWS[shard] if rows is None else rows
    columns = {"mix_id": [f"m{row}" for row in range(count)], "image": [bytes([first + row]) for row in range(count)]}
    written = write_part(pl.DataFrame(columns, schema=dict(tables.MIXED)), directory, shard, tables.MIXED, key)
    return Receipt(part, shard, count, written.checksum, 1.0 + shard, "n", written.bytes, key)


def note(root: Path, *receipts: Receipt, key: str = "key") -> None:
    with open_ledger(root, {"mixed": key}) as add:
        for receipt in receipts:
            add(receipt)


def done(root: Path, key: str = "key") -> set[int]:
    directory = root / "mixed"
    return finished_parts(read_receipts(root), part_bytes(directory), "mixed", directory, key, ROWS)


@pytest.fixture(params=["folder", "store"])
def root(request, tmp_path):
    return tmp_path if request.param == "folder" else request.getfixturevalue("bucket")


@pytest.fixture
def asked(monkeypatch):
    """Names of the part files whose footers were read."""
    names, metadata = [], tables.metadata
    monkeypatch.setattr(shards.tables, "metadata", lambda path: names.append(path.name) or metadata(path))
    return names


def test_what_has_receipts_is_finished_without_a_footer(root, asked):
    receipts = [made(root / "mixed", shard) for shard in ROWS]
    note(root, *receipts)
    assert done(root) == set(ROWS)
    assert asked == []
    assert [Receipt(**row) for row in read_receipts(root).iter_rows(named=True)] == receipts


def test_a_workspace_without_anything_has_nothing(root):
    assert read_receipts(root).is_empty()
    assert done(root) == set()


def test_truncated_deleted_foreign_and_unnoted_files_are_told_apart(root, asked):
    receipts = [made(root / "mixed", shard) for shard in ROWS]
    note(root, *receipts[:3])
    whole = part_path(root / "mixed", 0).read_bytes()
    part_path(root / "mixed", 0).write_bytes(whole[:-7])  # truncated
    part_path(root / "mixed", 1).unlink()
    made(root / "mixed", 2, "other", rows=2)  # foreign
    assert done(root) == {3} == finished_shards(root / "mixed", "key", ROWS)  # the driver died before it noted 3
    assert sorted(asked[:3]) == [f"part-{shard:08d}.parquet" for shard in (0, 2, 3)]


def test_a_receipt_with_another_number_of_rows_is_not_enough(root, asked):
    note(root, made(root / "mixed", 0, rows=2))
    assert done(root) == set()
    assert asked == ["part-00000000.parquet"]


def test_a_file_made_under_another_key_whose_receipt_was_lost_is_not_taken_for_the_one_before(root):
    note(root, made(root / "mixed", 0), made(root / "mixed", 1))
    with open_ledger(root, {"mixed": "yek"}):
        before = part_bytes(root / "mixed")
        made(root / "mixed", 0, "yek", first=7)
    assert part_bytes(root / "mixed") == before  # nothing but the footer tells
    assert done(root) == {1}
    assert done(root, "yek") == {0}


def test_going_back_to_a_key_begins_anew(root, asked):
    note(root, made(root / "mixed", 0), made(root / "mixed", 1))
    note(root, made(root / "mixed", 1, "other"), key="other")
    note(root, made(root / "mixed", 2))
    assert done(root) == {0, 2}
    assert sorted(asked) == ["part-00000000.parquet", "part-00000001.parquet"]


def test_another_part_under_another_key_changes_nothing(root, asked):
    note(root, made(root / "mixed", 0))
    with open_ledger(root, {"teacher": "t", "mixed": "key"}) as add:
        add(made(root / "teacher", 0, "t", part="teacher"))
    assert done(root) == {0}
    assert asked == []


def test_any_history_says_what_the_footers_say(tmp_path):
    chance, directory = random.Random(0), tmp_path / "mixed"
    for _ in range(60):
        key = chance.choice("ab")
        with open_ledger(tmp_path, {"mixed": key}) as add:
            for shard in chance.sample(list(ROWS), 2):
                receipt = made(directory, shard, key, first=ord(key))
                if chance.random() < 0.6:  # else the driver was killed before
                    add(receipt)
        if chance.random() < 0.3:
            part_path(directory, chance.choice(list(ROWS))).unlink(missing_ok=True)
        for asked_for in "ab":
            assert done(tmp_path, asked_for) == finished_shards(directory, asked_for, ROWS)


def test_receipts_of_older_versions_are_read_and_prove_nothing(tmp_path, asked):
    old = {name: value for name, value in asdict(made(tmp_path / "mixed", 0)).items() if name not in ("bytes", "key")}
    (tmp_path / "receipts.jsonl").write_text(json.dumps(old) + "\n")
    assert done(tmp_path) == {0}
    assert asked == ["part-00000000.parquet"]
    assert spent(read_receipts(tmp_path), "mixed", {0, 5}) == 1.0


def test_spent_is_the_last_receipt_of_each_shard(root):
    times = [(1, 5.0, "mixed"), (1, 2.0, "mixed"), (2, 3.0, "mixed"), (3, 100.0, "mixed"), (2, 50.0, "teacher")]
    note(root, *(Receipt(part, shard, 1, "c", seconds, "n", 1, "key") for shard, seconds, part in times))
    assert spent(read_receipts(root), "mixed", {1, 2, 7}) == 5.0


@pytest.mark.parametrize("cut", ['{"part": "mixed", "sha', '{"part"'])
def test_half_a_line_is_cut_off_and_the_next_one_is_whole(tmp_path, cut):
    receipts = [made(tmp_path / "mixed", shard) for shard in (0, 1)]
    note(tmp_path, receipts[0])
    with (tmp_path / "receipts.jsonl").open("a") as log:
        log.write(cut)
    assert len(read_receipts(tmp_path)) == 1
    note(tmp_path, receipts[1])
    assert [json.loads(line)["shard"] for line in (tmp_path / "receipts.jsonl").read_text().splitlines()] == [0, 1]


def test_on_a_store_receipts_are_few_objects_put_now_and_then(bucket, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ledger, "CHUNK_BYTES", 2000)
    receipts = [Receipt("mixed", shard, 1, "c", 1.0, "n", 9, "key") for shard in range(40)]
    with open_ledger(bucket, {"mixed": "key"}) as add:
        add(receipts[0])
        add(receipts[1])
        assert len(read_receipts(bucket)) == 1  # the first went at once, as long was nothing put
        now[0] += 5
        add(receipts[2])
        assert len(read_receipts(bucket)) == 3
        for receipt in receipts[3:]:
            add(receipt)
    assert read_receipts(bucket)["shard"].to_list() == list(range(40))
    size = len(json.dumps(asdict(receipts[0]))) + 1
    assert len(listing(bucket / "receipts")) == pytest.approx(40 * size / 2000, abs=1.5)


def test_files_that_are_no_parts_are_not_listed(root):
    made(root / "mixed", 0)
    (root / "mixed" / "encoder.json").write_text("{}")
    (root / "mixed" / ".part-00000001.parquet.7.tmp").write_text("half")
    assert list(part_bytes(root / "mixed")) == ["part-00000000.parquet"]
    assert part_bytes(root / "none") == {}
