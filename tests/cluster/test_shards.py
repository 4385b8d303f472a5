import polars as pl
import pyarrow.parquet as pq
import pytest

from cluster.shards import finished_shards, part_path, plan_shards, read_plan, write_part
from csm import tables
from csm.errors import InputError
from csm.pairs import all_pairs
from csm.planning import PlanConfig, make_plan, write_plan

ROWS = {0: 4, 1: 3}


def frame(rows, start=0):
    return pl.DataFrame(
        {"mix_id": [f"m{start + row}" for row in range(rows)], "image": [bytes([row]) for row in range(rows)]},
        schema=dict(tables.MIXED),
    )


@pytest.fixture
def parts(tmp_path):
    """Both shards of ``ROWS``, made under "key"."""
    for shard, rows in ROWS.items():
        write_part(frame(rows, 10 * shard), tmp_path, shard, tables.MIXED, "key")
    return tmp_path


def test_whole_parts_of_the_key_are_finished(parts):
    assert finished_shards(parts, "key", ROWS) == {0, 1}


def test_parts_of_another_key_are_not(parts):
    write_part(frame(4), parts, 0, tables.MIXED, "other")
    assert finished_shards(parts, "key", ROWS) == {1}


def test_a_missing_part_is_not(parts):
    part_path(parts, 1).unlink()
    assert finished_shards(parts, "key", ROWS) == {0}


def test_a_folder_that_does_not_exist_has_none(tmp_path):
    assert finished_shards(tmp_path / "none", "key", ROWS) == set()


@pytest.mark.parametrize("kept", [0, 1, 4, 0.5, -1])
def test_a_part_cut_short_anywhere_is_not(parts, kept):
    whole = part_path(parts, 0).read_bytes()
    part_path(parts, 0).write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    assert finished_shards(parts, "key", ROWS) == {1}


def test_a_part_with_another_number_of_rows_is_not(parts):
    assert finished_shards(parts, "key", {0: 4, 1: 4}) == {0}


def test_a_parquet_file_without_our_footer_is_not(parts):
    frame(4).write_parquet(part_path(parts, 0))
    assert finished_shards(parts, "key", ROWS) == {1}


def test_shards_that_the_plan_does_not_have_are_left_out(parts):
    assert finished_shards(parts, "key", {1: 3}) == {1}


def test_a_part_written_again_replaces_itself_byte_for_byte(parts):
    before = part_path(parts, 0).read_bytes()
    first = write_part(frame(4), parts, 0, tables.MIXED, "key")
    assert part_path(parts, 0).read_bytes() == before
    assert write_part(frame(4, 1), parts, 0, tables.MIXED, "key") != first
    assert sorted(path.name for path in parts.iterdir()) == ["part-00000000.parquet", "part-00000001.parquet"]


def test_a_part_of_another_schema_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="expected columns"):
        write_part(frame(2).rename({"image": "picture"}), tmp_path / "new", 0, tables.MIXED, "key")
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_the_shards_of_a_plan_are_its_rows_in_order(tmp_path):
    plan = make_plan(3, "data", "generator", PlanConfig(ratios=3, sets_per_pair=5, shard_rows=10))  # 45 rows, 9 to a shard
    tables.write(plan, tmp_path / "plan.parquet", tables.PLAN)
    rows = plan_shards(tmp_path / "plan.parquet")
    assert rows == {0: 9, 1: 9, 2: 9, 3: 9, 4: 9}
    assert list(rows) == sorted(rows)
    assert pl.concat([read_plan(tmp_path / "plan.parquet", shard) for shard in rows]).equals(plan)


def test_a_shard_is_read_from_its_row_group_alone(tmp_path):
    path, config = tmp_path / "plan.parquet", PlanConfig(ratios=9, sets_per_pair=30, shard_rows=1000)
    write_plan(path, all_pairs(40), "data", "generator", config)
    rows = plan_shards(path)
    wanted = list(rows)[len(rows) // 2]
    whole = read_plan(path, wanted)
    footer = pq.ParquetFile(path).metadata
    damaged = bytearray(path.read_bytes())
    assert footer.num_row_groups > 2
    for number in range(footer.num_row_groups):
        columns = [footer.row_group(number).column(column) for column in range(footer.num_columns)]
        shards = next(column.statistics for column in columns if column.path_in_schema == "shard")
        if not shards.min <= wanted <= shards.max:
            start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
            size = sum(column.total_compressed_size for column in columns)
            damaged[start : start + size] = bytes(size)
    path.write_bytes(damaged)
    assert read_plan(path, wanted).equals(whole)
    with pytest.raises(pl.exceptions.PolarsError):  # the damage is real
        read_plan(path, 0)
