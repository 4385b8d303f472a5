from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from scipy.stats import beta

from csm import tables
from csm.errors import InputError
from csm.pairs import all_pairs, listed_pairs
from csm.planning import (
    CHUNK_ROWS,
    PlanConfig,
    kind_digests,
    make_plan,
    plan_digest,
    planned_images,
    ratio_grid,
    shard_name,
    write_plan,
)

SET = ["class_a", "class_b", "group"]


def plan(n_classes: int = 4, dataset: str = "data", generator: str = "net", **settings: object) -> pl.DataFrame:
    return make_plan(n_classes, dataset, generator, PlanConfig(**{"sets_per_pair": 4, **settings}))


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


@pytest.mark.parametrize("ratios", [2, 3, 8, 255])
def test_ratios_are_evenly_spaced_with_both_ends(ratios: int) -> None:
    frame = plan(2, ratios=ratios, sets_per_pair=1)
    assert frame["lam"].to_numpy() == pytest.approx([step / (ratios - 1) for step in range(ratios)], abs=1e-7)
    assert (frame["lam"][0], frame["lam"][-1]) == (0.0, 1.0)  # exactly
    assert frame["step"].to_list() == list(range(ratios))


@pytest.mark.parametrize("ratios", [2, 3, 8, 255])
def test_the_cosine_grid_is_dense_at_both_ends(ratios: int) -> None:
    grid = ratio_grid(PlanConfig(ratios=ratios, grid="cosine"))
    # Chebyshev's extrema, moved to 0..1: an independent way to the same numbers
    extrema = (np.polynomial.chebyshev.chebpts2(ratios) + 1) / 2
    assert grid == pytest.approx(extrema, abs=1e-7)
    assert (grid[0], grid[-1]) == (0.0, 1.0)  # exactly


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("ratios", [2, 3, 8])
def test_the_beta_grid_is_quantiles_with_both_ends(ratios: int, alpha: float) -> None:
    grid = ratio_grid(PlanConfig(ratios=ratios, grid="beta", alpha=alpha))
    assert grid == pytest.approx(beta(alpha, alpha).ppf(np.linspace(0, 1, ratios)), rel=1e-5, abs=1e-7)
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert grid + grid[::-1] == pytest.approx(np.ones(ratios), abs=1e-6)  # neither class is favoured


def test_beta_of_1_is_uniform_and_beta_of_a_half_is_cosine() -> None:
    for alpha, name in ((1.0, "uniform"), (0.5, "cosine")):
        assert ratio_grid(PlanConfig(grid="beta", alpha=alpha)) == pytest.approx(ratio_grid(PlanConfig(grid=name)), abs=1e-6)


def test_a_list_of_ratios_is_taken_as_it_stands() -> None:
    frame = plan(3, ratios=(0.1, 0.5, 0.75), sets_per_pair=2)
    assert frame["lam"].to_list() == [np.float32(0.1), 0.5, 0.75] * 6
    assert frame["step"].to_list() == [0, 1, 2] * 6
    assert plan(2, ratios=(0.25,), sets_per_pair=1)["lam"].to_list() == [0.25]


@pytest.mark.parametrize("ratios", [(), (0.5, 0.5), (0.3, 0.2), (0.5, 0.5 + 1e-9), tuple(np.linspace(0, 1, 256).tolist())])
def test_a_list_must_rise_in_float32_and_fit_its_step(ratios: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"plan.ratios: expected 1 to 255 different ratios that rise"):
        ratio_grid(PlanConfig(ratios=ratios))


@pytest.mark.parametrize("alpha", [0.01, 1e-6, 1e-300])
def test_quantiles_that_fall_together_are_refused(alpha: float) -> None:
    with pytest.raises(InputError, match=r"plan.alpha: 9 quantiles of Beta\("):
        ratio_grid(PlanConfig(ratios=9, grid="beta", alpha=alpha))


def test_the_ids_and_seeds_of_the_first_version_are_kept() -> None:
    # As csm wrote them when every grid was uniform: a workspace of that time goes on with its pictures.
    rows = plan(10, ratios=8, sets_per_pair=12, shard_rows=360).select("mix_id", "shard", "seed", "lam")
    assert rows.row(0) == ("aecbf4d37ad2ae70-0-1-0-0", 0, 191737976224538226, 0.0)
    assert rows.row(-1) == ("aecbf4d37ad2ae70-8-9-11-7", 11, 8806369578188381925, 1.0)
    rows = plan(5, pairs=((3, 1), (0, 4)), ratios=5, sets_per_pair=3, shard_rows=7, seed=3).select(
        "mix_id", "shard", "seed", "lam"
    )
    assert rows.row(0) == ("fe74036800138b38-1-3-0-0", 0, 3954442275724354934, 0.0)
    assert rows.row(-1) == ("fe74036800138b38-0-4-2-4", 5, 6584924002585766304, 1.0)


def test_a_list_of_the_uniform_ratios_is_the_uniform_grid() -> None:
    assert plan(ratios=(0.0, 0.25, 0.5, 0.75, 1.0)).equals(plan(ratios=5))


GRIDS = [
    {},
    {"grid": "cosine"},
    {"grid": "beta"},
    {"grid": "beta", "alpha": 3.0},
    {"ratios": (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)},
]


def test_another_grid_gives_other_ids_from_the_same_noises() -> None:
    plans = [plan(**settings) for settings in GRIDS]
    ids = [set(frame["mix_id"]) for frame in plans]
    assert len(set.union(*ids)) == sum(len(part) for part in ids)
    assert all(frame["seed"].equals(plans[0]["seed"]) for frame in plans)


@pytest.mark.parametrize("settings", GRIDS)
def test_more_sets_or_other_pairs_keep_the_rows_of_any_grid(settings: dict[str, object]) -> None:
    columns = ["mix_id", "seed", *SET, "step", "lam"]
    whole = plan(6, sets_per_pair=4, **settings).select(columns)
    for other in ({"sets_per_pair": 2}, {"pairs": ((0, 3), (1, 2)), "sets_per_pair": 3, "shard_rows": 10}):
        some = plan(6, **settings, **other).select(columns)
        assert len(some.join(whole, on=columns)) == len(some)


def test_given_pairs_take_the_place_of_the_policy() -> None:
    chosen = listed_pairs([(0, 2), (1, 3)], 4)
    frame = make_plan(4, "data", "net", PlanConfig(pairs="confusion", ratios=3, sets_per_pair=4), chosen)
    assert frame.equals(plan(pairs=((0, 2), (1, 3)), ratios=3))
    with pytest.raises(ValueError, match="pairs: expected those that were chosen by confusion, got None"):
        plan(pairs="confusion")


def large(**settings: object) -> tuple[int, PlanConfig]:
    """A plan of several pieces: 40 classes, 780 pairs."""
    return 40, PlanConfig(**{"pairs": "all", "ratios": 9, "sets_per_pair": 30, "shard_rows": 1000, **settings})


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


def test_a_set_has_one_seed_and_no_other_set_has_it() -> None:
    frame = plan(6, ratios=4, sets_per_pair=7)
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


LABELS = np.array([2, 0, 3, 3, 1, 0, 2], dtype=np.uint16)


def plan_of_kinds(kinds: tuple[str, ...] = tables.KINDS, **settings: object) -> pl.DataFrame:
    config = PlanConfig(**{"kinds": kinds, "ratios": 3, "sets_per_pair": 2, "shard_rows": 7, **settings})
    return make_plan(4, "data", "net", config, labels=LABELS)


def test_kinds_stand_one_after_the_other_in_shards_of_their_own() -> None:
    frame = plan_of_kinds(("real", "noised", "semantic", "pixel", "unmixed"))
    assert frame["kind"].unique(maintain_order=True).to_list() == list(tables.KINDS)
    assert frame["mix_id"].n_unique() == len(frame) == 4 * 36 + len(LABELS)
    assert frame["shard"].is_sorted()
    numbers = [10_000_000 * place + number for place in range(4) for number in range(6)]
    assert sorted(set(frame["shard"])) == [*numbers, 40_000_000]
    assert frame.group_by("shard").agg(pl.col("kind").n_unique())["kind"].to_list() == [1] * 25
    assert frame.group_by("shard").len()["len"].max() <= 7
    assert plan_digest(frame) != plan_digest(frame.with_columns(kind=pl.lit("pixel", dtype=tables.KIND)))


def test_the_mixtures_are_the_same_beside_other_kinds() -> None:
    alone = plan_of_kinds(("semantic",))
    assert plan_of_kinds().filter(kind="semantic").equals(alone)
    assert alone.equals(plan(4, ratios=3, sets_per_pair=2, shard_rows=7))


@pytest.mark.parametrize("kind", tables.KINDS)
def test_a_kind_is_planned_alike_whatever_stands_beside_it(kind: str) -> None:
    alone = plan_of_kinds((kind,))
    assert alone.equals(plan_of_kinds().filter(kind=kind))
    more = plan_of_kinds((kind,), sets_per_pair=3)
    assert more.head(len(alone)).equals(alone)


def test_more_shards_than_a_kind_has_numbers_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csm.planning.SHARDS_OF_KIND", 5)
    assert set(plan_of_kinds(("pixel",), shard_rows=9)["shard"]) == {10, 11, 12, 13}
    with pytest.raises(InputError, match=r"plan.shard_rows: the plan has more than 5 shards: give it more rows a shard"):
        plan_of_kinds(("pixel",))


def test_no_two_kinds_share_a_noise() -> None:
    seeds = [set(plan_of_kinds((kind,))["seed"]) for kind in tables.KINDS]
    assert len(set.union(*seeds)) == sum(map(len, seeds)) == 12 + 36 + 12 + 12 + len(LABELS)


@pytest.mark.parametrize("kind", ["pixel", "noised"])
def test_what_mixes_real_images_has_the_pairs_sets_and_ratios_of_the_mixtures(kind: str) -> None:
    columns = [*SET, "step", "lam"]
    frame = plan_of_kinds((kind,))
    assert frame.select(columns).equals(plan_of_kinds(("semantic",)).select(columns))
    assert frame.group_by(SET).agg(pl.col("seed").n_unique())["seed"].to_list() == [1] * 12


@pytest.mark.parametrize("ratios", [2, 3, 8, (0.1, 0.5, 0.6)])
def test_unmixed_images_are_of_the_nearer_class_each_from_a_noise_of_its_own(ratios: object) -> None:
    frame, mixtures = (plan_of_kinds((kind,), ratios=ratios, sets_per_pair=4) for kind in ("unmixed", "semantic"))
    assert frame.select(*SET, "step").equals(mixtures.select(*SET, "step"))
    assert frame["seed"].n_unique() == len(frame)
    pairs = list(combinations(range(4), 2))
    for row, mixture in zip(frame.rows(named=True), mixtures.rows(named=True), strict=True):
        if mixture["lam"] != 0.5:
            assert row["lam"] == round(mixture["lam"])
        else:
            assert row["lam"] == (row["group"] + pairs.index((row["class_a"], row["class_b"]))) % 2
    middle = frame.filter(mixtures["lam"] == 0.5)
    assert len(middle) == 2 * middle["lam"].sum()  # both classes alike


def test_every_training_image_stands_once_with_its_label() -> None:
    frame = plan_of_kinds(("real",), shard_rows=3)
    assert frame.select("group", "class_a", "class_b", "step", "lam").rows() == [
        (number, label, label, 0, 1.0) for number, label in enumerate(LABELS.tolist())
    ]
    assert (frame["shard"] - 40_000_000).to_list() == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="labels: kind real needs those of the train split, got None"):
        plan(4, kinds=("real",))


@pytest.mark.parametrize("kinds", [("semantic",), ("pixel", "semantic"), tables.KINDS, ("real",)])
def test_the_written_plan_of_any_kinds_is_the_plan_that_is_made(kinds: tuple[str, ...], tmp_path: Path) -> None:
    labels = np.arange(70_000) % 40
    classes, config = large(kinds=kinds, sets_per_pair=10)
    rows, digest = write_plan(tmp_path / "plan.parquet", all_pairs(classes), "data", "net", config, labels)
    made = make_plan(classes, "data", "net", config, labels=labels)
    assert planned_images(config, 780, 70_000) == dict(made["kind"].value_counts().iter_rows())
    assert rows == len(made)
    assert kind_digests(tmp_path / "plan.parquet") == {kind: plan_digest_of(made, kind) for kind in kinds}
    assert digest == plan_digest(made)
    assert tables.read_plan(tmp_path / "plan.parquet").equals(made)
    for kind in tables.KINDS:
        assert tables.read_plan(tmp_path / "plan.parquet", kind).equals(made.filter(kind=kind))


def plan_digest_of(plan: pl.DataFrame, kind: str) -> str:
    """The digest of its rows of ``kind``, if these were mixtures alone."""
    return plan_digest(plan.filter(kind=kind).with_columns(kind=pl.lit("semantic", dtype=tables.KIND)))


def test_the_digest_of_mixtures_alone_is_that_of_the_first_version() -> None:
    assert plan_digest(plan(10, ratios=8, sets_per_pair=12, shard_rows=360)) == "79dc824a17eef690"


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ((), r"plan.kinds: expected different kinds of images, at least one, got \[\]"),
        (("pixel", "pixel"), "plan.kinds: expected different kinds of images"),
        (("mixed",), "plan.kinds: unknown 'mixed'; one of semantic, unmixed, pixel, noised, real"),
    ],
)
def test_kinds_must_be_known_and_different(kinds: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(4, kinds=kinds)


def test_a_shard_is_called_by_its_number_among_those_of_its_kind(tmp_path: Path) -> None:
    settings = PlanConfig(sets_per_pair=2, shard_rows=16, kinds=("semantic", "noised"))
    write_plan(tmp_path / "plan.parquet", all_pairs(3), "data", "net", settings)
    rows = tables.read_plan(tmp_path / "plan.parquet")
    named = {
        kind: [shard_name(shard) for shard in rows.filter(kind=kind)["shard"].unique(maintain_order=True)]
        for kind in settings.kinds
    }
    assert named["semantic"][:2] == ["shard 0", "shard 1"]
    assert named["noised"] == [f"{name} of kind noised" for name in named["semantic"]]
