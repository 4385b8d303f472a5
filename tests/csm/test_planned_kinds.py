"""Plans of several kinds of images."""

from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from csm import tables
from csm.errors import InputError
from csm.pairs import all_pairs
from csm.planning import PlanConfig, first_shard, kind_digests, make_plan, plan_digest, planned_images, shard_name, write_plan
from tests.csm.plans import SET, large, plan

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
    assert frame.group_by("kind").agg(pl.col("shard").min()).rows_by_key("kind") == {
        kind: [(first_shard(kind),)] for kind in tables.KINDS
    }
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
    for noise, each in (("set", 12), ("image", 36)):
        seeds = [set(plan_of_kinds((kind,), noise=noise)["seed"]) for kind in tables.KINDS]
        assert len(set.union(*seeds)) == sum(map(len, seeds)) == each + 36 + each + each + len(LABELS)


@pytest.mark.parametrize("kind", ["pixel", "noised"])
def test_what_mixes_real_images_has_the_pairs_sets_and_ratios_of_the_mixtures(kind: str) -> None:
    columns = [*SET, "step", "lam"]
    frame = plan_of_kinds((kind,))
    assert frame.select(columns).equals(plan_of_kinds(("semantic",)).select(columns))
    for noise, each in (("set", 1), ("image", 3)):
        seeds = plan_of_kinds((kind,), noise=noise).group_by(SET).agg(pl.col("seed").n_unique())["seed"]
        assert seeds.to_list() == [each] * 12


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


def test_every_image_may_have_a_noise_of_its_own() -> None:
    shared, own = (plan_of_kinds(noise=noise) for noise in ("set", "image"))
    columns = [*SET, "step", "lam", "kind", "shard"]
    assert own.select(columns).equals(shared.select(columns))
    assert own["seed"].n_unique() == len(own)
    assert own.equals(plan_of_kinds())  # the default
    for kind in tables.KINDS:
        ids = [set(frame.filter(kind=kind)["mix_id"]) for frame in (shared, own)]
        # What has noises of its own anyway, or none, is not made again.
        assert ids[0] == ids[1] if kind in ("unmixed", "real") else ids[0].isdisjoint(ids[1])
    more = plan_of_kinds(("semantic",), noise="image", sets_per_pair=3)
    assert more.head(36).equals(own.filter(kind="semantic"))
    ratios = plan_of_kinds(("semantic",), noise="image", ratios=(0.0, 0.25, 1.0))
    assert ratios["seed"].equals(own.filter(kind="semantic")["seed"])
    assert set(ratios["mix_id"]).isdisjoint(own["mix_id"])
