"""Plan, images and labels joined to one set; its first sets, and several kinds of images together."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.schedules import MixedSet, Schedule
from csm.sparse_labels import SparseLabels, rows_of
from tests.csm.joined import CLASSES, SHAPE, draw, identity, make_tables, mixed_set


def assert_joined(mixed: MixedSet, sets: int, ratios: int) -> None:
    assert mixed.rows.shape == (sets, ratios)
    assert len({identity(mixed, row) for row in range(len(mixed.images))}) == sets * ratios
    assert sorted(mixed.rows.flatten().tolist()) == list(range(sets * ratios))
    for number in range(sets):
        group = identity(mixed, int(mixed.rows[number, 0]))[2]
        for step in range(ratios):
            row = int(mixed.rows[number, step])
            expected = (int(mixed.class_a[number]), int(mixed.class_b[number]), group, step)
            assert identity(mixed, row) == expected
            assert tuple(mixed.labels[row].int().tolist()) == expected  # every image has its own soft label


@pytest.mark.parametrize("settings", [{}, {"ratios": 12, "sets": 12, "pairs": ((0, 1), (2, 3))}, {"ratios": 2, "sets": 1}])
def test_the_order_of_the_files_does_not_matter(settings: dict[str, object]) -> None:
    plan, mixed, labels = make_tables(**settings)
    ratios = int(plan["step"].max()) + 1
    shuffled = [frame.sample(fraction=1.0, shuffle=True, seed=seed) for seed, frame in enumerate((plan, mixed, labels))]
    joined = MixedSet.join(*shuffled, SHAPE)
    assert_joined(joined, len(plan) // ratios, ratios)
    straight = MixedSet.join(plan, mixed, labels, SHAPE)
    assert torch.equal(joined.images, straight.images)
    assert torch.equal(joined.labels, straight.labels)


def test_rows_beyond_the_plan_are_left_out() -> None:
    plan, mixed, labels = make_tables()
    few = plan.filter(pl.col("group") < 2)
    assert_joined(MixedSet.join(few, mixed, labels, SHAPE), 12, 4)


@pytest.mark.parametrize("which", [1, 2], ids=["image", "label"])
def test_a_missing_row_is_counted(which: int) -> None:
    frames = list(make_tables())
    frames[which] = frames[which].slice(5)
    with pytest.raises(InputError, match="5 of 72 planned images are not mixed and annotated"):
        MixedSet.join(*frames, SHAPE)


@pytest.mark.parametrize("which", [1, 2], ids=["image", "label"])
def test_a_row_that_stands_twice_does_not_hide_a_missing_one(which: int) -> None:
    frames = list(make_tables(pairs=((0, 1),), sets=2))
    first_set, second_set = frames[which].head(4), frames[which].tail(4)
    assert not first_set.equals(second_set)
    frames[which] = pl.concat([first_set, first_set])  # as many rows as planned
    with pytest.raises(InputError, match="planned images"):
        MixedSet.join(*frames, SHAPE)
    frames[which] = pl.concat([first_set, second_set, first_set])
    with pytest.raises(InputError, match="twice"):
        MixedSet.join(*frames, SHAPE)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="expected 3 per image"):
        MixedSet.join(*make_tables(), (1, 3, 1))


@pytest.mark.parametrize("sets", [1, 2, 5])
@pytest.mark.parametrize("pairs", ["all", ((0, 1), (2, 3), (0, 3))])
def test_the_first_sets_of_each_pair_are_those_of_a_smaller_plan(sets: int, pairs: object) -> None:
    first, smaller = mixed_set(sets=5, pairs=pairs).first(sets), mixed_set(sets=sets, pairs=pairs)
    for name in ("images", "labels", "rows", "class_a", "class_b", "ratios"):
        assert torch.equal(getattr(first, name), getattr(smaller, name))
    assert_joined(first, sets * (6 if pairs == "all" else 3), 4)


def test_the_first_sets_whatever_their_order() -> None:
    """A plan of pairs that came one after the other, not group by group."""
    mixed = mixed_set(sets=3)
    order = torch.randperm(len(mixed.rows), generator=draw(1))
    shuffled = replace(mixed, rows=mixed.rows[order], class_a=mixed.class_a[order], class_b=mixed.class_b[order])
    first = shuffled.first(2)
    expected, seen = [], {}
    for row in shuffled.rows:
        pair = identity(mixed, int(row[0]))[:2]
        seen[pair] = seen.get(pair, 0) + 1
        if seen[pair] <= 2:
            expected.append([identity(mixed, int(image)) for image in row])
    assert [[identity(first, int(image)) for image in row] for row in first.rows] == expected


def test_all_sets_are_the_same_object_and_more_are_refused() -> None:
    mixed = mixed_set(sets=3)
    assert mixed.first(None) is mixed
    with pytest.raises(InputError, match=r"mixed.sets: a pair has only 3 sets of mixed images, not 4: .* \(plan.sets_per_pair\)"):
        mixed.first(4)


def test_labels_and_images_have_the_types_of_training() -> None:
    mixed = mixed_set()
    assert mixed.labels.dtype == torch.float32
    assert mixed.images.dtype == torch.uint8
    assert torch.equal(mixed.images, tables.to_images(tables.from_images(mixed.images), SHAPE))


@pytest.mark.parametrize("kind", tables.KINDS)
def test_a_kind_alone_is_joined_and_drawn_from(kind: str) -> None:
    config = PlanConfig(ratios=3, sets_per_pair=2, kinds=tables.KINDS)
    plan = make_plan(CLASSES, "data", "net", config, labels=np.arange(10) % CLASSES)
    cells = [bytes([number % 256, number // 256, 0, 0]) for number in range(len(plan))]  # which row of the plan it is
    labels = pl.Series("soft_label", np.full((len(plan), CLASSES), 0.25), dtype=pl.Array(pl.Float32, CLASSES))
    frames = plan.select("mix_id").with_columns(image=pl.Series(cells)), plan.select("mix_id").with_columns(labels)
    mixed = MixedSet.join(plan.filter(kind=kind), *frames, SHAPE)
    numbers = [first + 256 * second for first, second, *_ in mixed.images.flatten(1).tolist()]
    assert sorted(numbers) == [number for number, other in enumerate(plan["kind"]) if other == kind]
    assert mixed.rows.shape == ((10, 1) if kind == "real" else (12, 3))
    rows = Schedule("uniform", 1, mixed, CLASSES).draw(torch.zeros(1000, dtype=torch.int64), draw())
    assert set(rows.tolist()) == set(range(len(numbers)))
    with pytest.raises(ValueError, match="plan: expected rows of one kind"):
        MixedSet.join(plan, *frames, SHAPE)


@pytest.mark.parametrize("sparse", [(), (0, 1), (1,)])  # which parts have sparse labels
def test_several_kinds_are_drawn_from_together_each_image_with_its_own_label(sparse: tuple[int, ...]) -> None:
    parts = [mixed_set(sets=3), replace(mixed_set(sets=2), images=255 - mixed_set(sets=2).images)]
    for number in sparse:
        part, classes = parts[number], torch.arange(2, dtype=torch.int32).expand(len(parts[number].images), 2)
        parts[number] = replace(part, labels=SparseLabels(classes, part.labels[:, :2], part.labels[:, 2], CLASSES))
    mixed = MixedSet.concat(parts)
    assert mixed.rows.shape == (30, 4)
    assert torch.equal(mixed.ratios, parts[0].ratios)
    both = zip(range(30), [(part, number) for part in parts for number in range(len(part.rows))], strict=True)
    for row, (part, number) in both:
        for mine, own in zip(mixed.rows[row].tolist(), part.rows[number].tolist(), strict=True):
            assert torch.equal(mixed.images[mine], part.images[own])
            assert torch.equal(rows_of(mixed.labels, torch.tensor([mine])), rows_of(part.labels, torch.tensor([own])))
        assert (mixed.class_a[row], mixed.class_b[row]) == (part.class_a[number], part.class_b[number])
    drawn = Schedule("interior", 1, mixed, CLASSES).draw(torch.zeros(4000, dtype=torch.int64), draw())
    assert set(drawn.tolist()) == set(mixed.rows[:, 1:3].flatten().tolist())
    assert torch.equal(mixed.first(1).images, torch.cat([part.first(1).images for part in parts]))
    with pytest.raises(InputError, match="only 2 sets"):
        mixed.first(3)
    assert MixedSet.concat(parts[:1]) is parts[0]


def test_kinds_of_different_ratios_are_drawn_from_together_by_rules_that_ask_for_none() -> None:
    parts = [
        mixed_set(),
        replace(mixed_set(), ratios=torch.tensor([0.0, 0.0, 1.0, 1.0])),
    ]  # the second as images of one class each
    mixed = MixedSet.concat(parts)
    assert mixed.ratios.isnan().all()
    drawn = Schedule("uniform", 1, mixed, CLASSES).draw(torch.zeros(4000, dtype=torch.int64), draw())
    assert set(drawn.tolist()) == set(range(len(mixed.images)))
    for rule in ("pair", "interior", "endpoints"):
        with pytest.raises(InputError, match=f"schedule '{rule}' needs images that have all the same ratios"):
            Schedule(rule, 1, mixed, CLASSES)
    with pytest.raises(InputError, match="sets of different numbers of images cannot be drawn from together"):
        MixedSet.concat([mixed_set(), mixed_set(ratios=3)])
