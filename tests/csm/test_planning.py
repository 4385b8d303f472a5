"""Rows, ids, seeds and shards of a plan, in memory and as it is written."""

from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from csm import tables
from csm.errors import InputError
from csm.pairs import all_pairs, listed_pairs
from csm.planning import CHUNK_ROWS, PlanConfig, make_plan, plan_digest, write_plan
from tests.csm.plans import SET, large, plan


def test_every_pair_ratio_and_set_stands_once() -> None:
    frame = plan(4, ratios=3, sets_per_pair=2)
    expected = {(a, b, group, step) for a, b in combinations(range(4), 2) for group in range(2) for step in range(3)}
    rows = list(frame.select(*SET, "step").iter_rows())
    assert len(rows) == len(expected)
    assert set(rows) == expected
    assert tables.check(frame, tables.PLAN) is frame


def test_rows_come_by_group_then_pair_then_step() -> None:
    frame = plan(4, ratios=3, sets_per_pair=3)
    assert frame.equals(frame.sort("group", "class_a", "class_b", "step"))


def test_the_ids_and_seeds_of_the_first_version_are_kept() -> None:
    # As csm wrote them when every grid was uniform and every set had one noise: a workspace of that time goes on with its pictures.
    rows = plan(10, ratios=8, sets_per_pair=12, shard_rows=360, noise="set").select("mix_id", "shard", "seed", "lam")
    assert rows.row(0) == ("aecbf4d37ad2ae70-0-1-0-0", 0, 191737976224538226, 0.0)
    assert rows.row(-1) == ("aecbf4d37ad2ae70-8-9-11-7", 11, 8806369578188381925, 1.0)
    rows = plan(5, pairs=((3, 1), (0, 4)), ratios=5, sets_per_pair=3, shard_rows=7, seed=3, noise="set").select(
        "mix_id", "shard", "seed", "lam"
    )
    assert rows.row(0) == ("fe74036800138b38-1-3-0-0", 0, 3954442275724354934, 0.0)
    assert rows.row(-1) == ("fe74036800138b38-0-4-2-4", 5, 6584924002585766304, 1.0)


def test_given_pairs_take_the_place_of_the_policy() -> None:
    chosen = listed_pairs([(0, 2), (1, 3)], 4)
    frame = make_plan(4, "data", "net", PlanConfig(pairs="confusion", ratios=3, sets_per_pair=4), chosen)
    assert frame.equals(plan(pairs=((0, 2), (1, 3)), ratios=3))
    with pytest.raises(ValueError, match="pairs: expected those that were chosen by confusion, got None"):
        plan(pairs="confusion")


@pytest.mark.parametrize("settings", [{}, {"grid": "cosine"}, {"shard_rows": 10**6}, {"shard_rows": 1, "sets_per_pair": 12}])
def test_the_written_plan_is_the_plan_that_is_made(settings: dict[str, object], tmp_path: Path) -> None:
    classes, config = large(**settings)
    rows, digest = write_plan(tmp_path / "plan.parquet", all_pairs(classes), "data", "net", config)
    made = make_plan(classes, "data", "net", config)
    assert rows == len(made) > CHUNK_ROWS
    assert digest == plan_digest(made)
    assert tables.read(tmp_path / "plan.parquet", tables.PLAN).equals(made)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.parquet"]


def test_a_row_group_holds_whole_shards(tmp_path: Path) -> None:
    classes, config = large()
    write_plan(tmp_path / "plan.parquet", all_pairs(classes), "data", "net", config)
    file = pq.ParquetFile(tmp_path / "plan.parquet")
    assert file.num_row_groups > 1
    shards = [set(file.read_row_group(number)["shard"].to_pylist()) for number in range(file.num_row_groups)]
    assert len(set.union(*shards)) == sum(len(group) for group in shards)
    assert all(file.metadata.row_group(number).num_rows <= CHUNK_ROWS for number in range(file.num_row_groups))


def test_a_list_of_pairs_is_taken_whatever_its_direction() -> None:
    frame = plan(5, pairs=((3, 1), (0, 4)), ratios=2, sets_per_pair=1)
    assert set(frame.select("class_a", "class_b").iter_rows()) == {(1, 3), (0, 4)}
    assert (frame["class_a"] < frame["class_b"]).all()


def test_a_row_is_the_same_in_every_plan_that_holds_it() -> None:
    whole = plan(6, ratios=4, sets_per_pair=3)
    some = plan(6, pairs=((5, 2), (0, 1)), ratios=4, sets_per_pair=2, shard_rows=4)
    columns = ["mix_id", "seed", *SET, "step", "lam"]
    both = some.select(columns).join(whole.select(columns), on=columns, how="inner")
    assert len(both) == len(some) == 16


def test_more_sets_keep_the_earlier_rows() -> None:
    few, many = plan(sets_per_pair=2, ratios=3, shard_rows=6), plan(sets_per_pair=5, ratios=3, shard_rows=6)
    assert many.head(len(few)).equals(few)
    assert set(many["group"].to_list()) == set(range(5))


def test_ids_are_unique_and_cannot_be_taken_for_each_other() -> None:
    # 7_0_1 is the beginning of 7_0_10; a join on the whole id tells them apart.
    frame = plan(12, ratios=12, sets_per_pair=12)
    ids = frame["mix_id"].to_list()
    assert len(set(ids)) == len(ids) == 66 * 12 * 12
    prefix = frame.row(
        by_predicate=(pl.col("class_a") == 0) & (pl.col("class_b") == 7) & (pl.col("group") == 1) & (pl.col("step") == 0),
        named=True,
    )
    longer = [other for other in ids if other.startswith(prefix["mix_id"][:-2]) and other != prefix["mix_id"]]
    assert any("-10-" in other for other in longer)  # the danger is real
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    joined = pl.DataFrame([prefix], schema=frame.schema).select("mix_id").join(shuffled, on="mix_id")
    assert joined.rows(named=True) == [prefix]


def test_a_plan_is_a_function_of_its_arguments() -> None:
    assert plan(seed=3).equals(plan(seed=3))
    assert plan_digest(plan(seed=3)) == plan_digest(plan(seed=3))


@pytest.mark.parametrize("change", [{"dataset": "other"}, {"generator": "other"}, {"seed": 1}])
def test_another_data_set_generator_or_seed_gives_other_ids_and_noises(change: dict[str, object]) -> None:
    before, after = plan(), plan(**change)
    assert not set(before["mix_id"]) & set(after["mix_id"])
    assert not set(before["seed"]) & set(after["seed"])
    assert plan_digest(before) != plan_digest(after)


def test_a_set_of_one_noise_has_one_seed_and_no_other_set_has_it() -> None:
    frame = plan(6, ratios=4, sets_per_pair=7, noise="set")
    seeds = frame.group_by(SET).agg(pl.col("seed").n_unique().alias("different"), pl.col("seed").first())
    assert seeds["different"].to_list() == [1] * 15 * 7
    assert seeds["seed"].n_unique() == 15 * 7


@pytest.mark.parametrize(("shard_rows", "ratios"), [(1, 4), (4, 4), (10, 4), (12, 4), (7, 3), (10_000, 5)])
def test_a_shard_is_whole_sets(shard_rows: int, ratios: int) -> None:
    frame = plan(5, ratios=ratios, sets_per_pair=3, shard_rows=shard_rows)
    assert frame.group_by(SET).agg(pl.col("shard").n_unique())["shard"].to_list() == [1] * 30
    sizes = frame.group_by("shard", maintain_order=True).len()
    full = max(1, shard_rows // ratios) * ratios
    assert sizes["shard"].to_list() == list(range(len(sizes)))
    assert sizes["len"].to_list()[:-1] == [full] * (len(sizes) - 1)
    assert 0 < sizes["len"][-1] <= full


@pytest.mark.parametrize("pair", [(1, 1), (0, 3), (-1, 0), (3, 3)])
def test_a_pair_of_no_two_classes_is_named(pair: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"plan.pairs: \[{pair[0]}, {pair[1]}\] is not a pair of two different classes of 0..2"):
        plan(3, pairs=((0, 1), pair))


@pytest.mark.parametrize("pairs", [(), ((0, 1), (0, 1)), ((0, 1), (1, 0))], ids=["none", "twice", "twice-reversed"])
def test_pairs_must_be_different(pairs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InputError, match=r"plan.pairs: expected different pairs, at least one"):
        plan(3, pairs=pairs)


@pytest.mark.parametrize(
    "settings",
    [{"ratios": 1}, {"ratios": 256}, {"sets_per_pair": 0}, {"shard_rows": 0}, {"seed": -1}, {"pairs": "some"}, {"pair": "all"}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        plan(**settings)


def test_the_digest_sees_every_cell() -> None:
    frame = plan(3, ratios=2, sets_per_pair=1)
    digests = {plan_digest(frame)}
    for name in frame.columns:
        other = {"mix_id": "other", "kind": "pixel"}.get(name, 99)
        changed = pl.Series(name, [other, *frame[name][1:]], dtype=frame.schema[name])
        digests.add(plan_digest(frame.with_columns(changed)))
    digests.add(plan_digest(frame.reverse()))
    assert len(digests) == len(frame.columns) + 2


def test_seeds_are_spread() -> None:
    seeds = plan(10, sets_per_pair=20, ratios=2)["seed"].unique().to_numpy()
    assert seeds.min() >= 0
    assert np.median(seeds) == pytest.approx(2**62, rel=0.1)


def test_the_digest_of_mixtures_alone_is_that_of_the_first_version() -> None:
    assert plan_digest(plan(10, ratios=8, sets_per_pair=12, shard_rows=360, noise="set")) == "79dc824a17eef690"
