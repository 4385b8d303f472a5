import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from csm import tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.schedules import SCHEDULES, MixedSet, Schedule, soften
from csm.sparse_labels import SparseLabels, rows_of

SHAPE = (1, 4, 1)
CLASSES = 4


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_tables(ratios: int = 4, sets: int = 3, pairs: object = "all") -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Plan, mixed and labels in which every image and every soft label tells which row it belongs to."""
    plan = make_plan(CLASSES, "data", "net", PlanConfig(pairs=pairs, ratios=ratios, sets_per_pair=sets))
    identities = list(plan.select("class_a", "class_b", "group", "step").iter_rows())
    images = pl.Series("image", [bytes(identity) for identity in identities], dtype=pl.Binary)
    labels = pl.Series("soft_label", np.array(identities, dtype=np.float32), dtype=pl.Array(pl.Float32, CLASSES))
    return plan, plan.select("mix_id").with_columns(images), plan.select("mix_id").with_columns(labels)


def mixed_set(**settings: object) -> MixedSet:
    return MixedSet.join(*make_tables(**settings), SHAPE)


def identity(mixed: MixedSet, row: int) -> tuple[int, ...]:
    """(class_a, class_b, group, step) that is written in the pixels of ``row``."""
    return tuple(mixed.images[row].flatten().tolist())


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


@pytest.mark.parametrize(("per_real", "ratios"), [(1, 4), (2, 4), (5, 3), (2, 8), (1, 2), (2, 2), (4, 2)])
def test_pair_gives_the_classes_own_endpoint_and_interior_images_of_one_set(per_real: int, ratios: int) -> None:
    mixed = mixed_set(ratios=ratios)
    labels = torch.tensor([0, 1, 2, 3, 3, 0] * 20)
    rows = Schedule("pair", per_real, mixed, CLASSES).draw(labels, draw())
    assert rows.shape == (len(labels) * per_real,)
    for number, label in enumerate(labels.tolist()):
        companions = [identity(mixed, int(row)) for row in rows.view(per_real, len(labels))[:, number]]
        class_a, class_b, group, step = companions[0]
        assert label in (class_a, class_b)
        assert step == (ratios - 1 if label == class_a else 0)  # lam = 1 is class_a
        for companion in companions[1:]:
            assert companion[:3] == (class_a, class_b, group)
            if ratios > 2:
                assert 0 < companion[3] < ratios - 1
            else:
                assert companion == companions[0]  # a set of two has no interior


@pytest.mark.parametrize(
    ("ratios", "ends", "inner"),
    [
        ((0.0, 0.3, 0.5, 1.0), (0, 3), {1, 2}),
        ((0.2, 0.5, 0.8), (0, 2), {0, 1, 2}),  # no endpoints: those with most of the class stand in
        ((0.0, 0.5, 0.8), (0, 2), {1, 2}),
        ((0.5, 1.0), (0, 1), {0}),
        ((0.4,), (0, 0), {0}),
    ],
)
def test_endpoints_and_interior_are_told_by_the_ratio(ratios: tuple[float, ...], ends: tuple[int, int], inner: set[int]) -> None:
    mixed = mixed_set(ratios=ratios, pairs=((0, 1), (1, 2), (2, 3)))
    assert mixed.ratios.tolist() == pytest.approx(ratios)
    labels = torch.arange(CLASSES).repeat(50)
    own, other = Schedule("pair", 2, mixed, CLASSES).draw(labels, draw()).view(2, -1).tolist()
    for row, label in zip(own, labels.tolist(), strict=True):
        class_a, _, _, step = identity(mixed, row)
        assert step == ends[label == class_a]
    assert {identity(mixed, row)[3] for row in other} == inner
    interior = Schedule("interior", 2, mixed, CLASSES).draw(labels, draw()).tolist()
    assert {identity(mixed, row)[3] for row in interior} == inner


def test_a_list_of_endpoints_has_no_interior() -> None:
    with pytest.raises(InputError, match="a list with one between 0 and 1"):
        Schedule("interior", 2, mixed_set(ratios=(0.0, 1.0)), CLASSES).draw(torch.tensor([0]), draw())


@pytest.mark.parametrize("rule", ["pair", "interior"])
def test_with_both_endpoints_the_draws_are_those_of_the_first_version(rule: str) -> None:
    mixed, labels = mixed_set(ratios=5), torch.arange(CLASSES).repeat(20)
    drawn = Schedule(rule, 3, mixed, CLASSES).draw(labels, draw(9))
    again = draw(9)
    if rule == "interior":
        rows = mixed.rows[:, 1:-1].flatten()
        assert torch.equal(drawn, rows[torch.randint(0, len(rows), (3 * len(labels),), generator=again)])
    else:
        torch.rand(len(labels), generator=again)
        steps = torch.randint(1, 4, (2, len(labels)), generator=again)
        assert [identity(mixed, row)[3] for row in drawn.view(3, -1)[1:].flatten().tolist()] == steps.flatten().tolist()


def test_pair_draws_every_set_of_the_class_and_every_interior_ratio_alike() -> None:
    mixed = mixed_set(ratios=5)
    rows = Schedule("pair", 2, mixed, CLASSES).draw(torch.full((9000,), 2), draw())
    own, interior = ([identity(mixed, int(row)) for row in half] for half in rows.view(2, 9000))
    sets: dict[tuple[int, ...], int] = {}
    for row in own:
        sets[row[:3]] = sets.get(row[:3], 0) + 1
    expected = {(min(2, k), max(2, k), group) for k in (0, 1, 3) for group in range(3)}
    assert set(sets) == expected
    assert all(abs(count - 1000) < 150 for count in sets.values())  # five standard deviations
    steps = [row[3] for row in interior]
    assert all(abs(steps.count(step) - 3000) < 230 for step in (1, 2, 3))


def test_pair_with_unequal_numbers_of_sets_draws_from_none_that_lacks_the_class() -> None:
    mixed = mixed_set(pairs=((0, 1), (0, 2), (0, 3)), sets=2)  # class 0 has six sets, the others two
    labels = torch.arange(CLASSES).repeat(500)
    rows = Schedule("pair", 1, mixed, CLASSES).draw(labels, draw())
    seen: dict[int, set[tuple[int, ...]]] = {label: set() for label in range(CLASSES)}
    for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
        assert label in identity(mixed, row)[:2]
        seen[label].add(identity(mixed, row)[:3])
    assert {label: len(sets) for label, sets in seen.items()} == {0: 6, 1: 2, 2: 2, 3: 2}


def test_pair_refuses_a_class_without_a_pair() -> None:
    schedule = Schedule("pair", 2, mixed_set(pairs=((0, 1), (1, 2))), CLASSES)
    assert len(schedule.draw(torch.tensor([0, 1, 2]), draw())) == 6
    with pytest.raises(InputError, match="schedule 'pair' needs a mixed pair for every class"):
        schedule.draw(torch.tensor([0, 3]), draw())


def test_uniform_draws_every_image_alike() -> None:
    mixed = mixed_set()
    rows = Schedule("uniform", 2, mixed, CLASSES).draw(torch.zeros(7200, dtype=torch.int64), draw())
    counts = torch.bincount(rows, minlength=72)
    assert len(rows) == 14400
    assert counts.shape == (72,)
    assert (counts - 200).abs().max() < 80


def test_interior_draws_every_image_but_the_endpoints_alike() -> None:
    mixed = mixed_set()
    rows = Schedule("interior", 3, mixed, CLASSES).draw(torch.zeros(2400, dtype=torch.int64), draw())
    counts = torch.bincount(rows, minlength=72)
    for row, count in enumerate(counts.tolist()):
        if identity(mixed, row)[3] in (0, 3):
            assert count == 0
        else:
            assert abs(count - 200) < 80


def test_interior_needs_an_interior() -> None:
    with pytest.raises(InputError, match=r"schedule 'interior' needs plan.ratios of at least 3"):
        Schedule("interior", 2, mixed_set(ratios=2), CLASSES).draw(torch.tensor([0]), draw())


@pytest.mark.parametrize("rule", SCHEDULES)
def test_a_draw_depends_on_the_generator_alone(rule: str) -> None:
    schedule = Schedule(rule, 2, mixed_set(), CLASSES)
    labels = torch.arange(CLASSES).repeat(10)
    first = schedule.draw(labels, draw(4))
    torch.manual_seed(0)
    assert torch.equal(schedule.draw(labels, draw(4)), first)
    assert not torch.equal(schedule.draw(labels, draw(5)), first)
    assert first.dtype == torch.int64


def test_an_unknown_rule_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"schedule: unknown 'best'; one of pair, uniform, interior"):
        Schedule("best", 2, mixed_set(), CLASSES)


def test_labels_and_images_have_the_types_of_training() -> None:
    mixed = mixed_set()
    assert mixed.labels.dtype == torch.float32
    assert mixed.images.dtype == torch.uint8
    assert torch.equal(mixed.images, tables.to_images(tables.from_images(mixed.images), SHAPE))


def test_ambiguity_draws_in_proportion_to_the_entropy_of_the_label() -> None:
    mixed = mixed_set()
    labels = torch.zeros(len(mixed.images), CLASSES)
    labels[:, 0] = 1.0
    labels[2] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    labels[7] = torch.tensor([0.9, 0.05, 0.05, 0.0])
    schedule = Schedule("ambiguity", 1, replace(mixed, labels=labels), CLASSES)
    drawn = schedule.draw(torch.zeros(20_000, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {2, 7}
    first, second = math.log(2), -(0.9 * math.log(0.9) + 0.1 * math.log(0.05))
    assert (drawn == 2).double().mean().item() == pytest.approx(first / (first + second), abs=0.01)


def test_ambiguity_without_any_is_refused() -> None:
    mixed = mixed_set()
    certain = torch.zeros(len(mixed.images), CLASSES)
    certain[:, 1] = 1.0
    with pytest.raises(InputError, match=r"schedule 'ambiguity' needs soft labels; .* take 'uniform'"):
        Schedule("ambiguity", 1, replace(mixed, labels=certain), CLASSES).draw(
            torch.zeros(2, dtype=torch.int64), torch.Generator()
        )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_softening_is_a_power_of_the_label(temperature: float) -> None:
    labels = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    power = labels.double() ** (1 / temperature)
    assert torch.allclose(soften(labels, temperature).double(), power / power.sum(dim=1, keepdim=True), atol=1e-6)
    assert soften(labels, temperature)[1].tolist() == [1.0, 0.0, 0.0]


def test_a_tiny_temperature_leaves_a_label() -> None:
    assert soften(torch.tensor([[0.5, 0.3, 0.2]]), 1e-4).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("ratios", [2, 3, 8])
def test_endpoints_are_the_ends_of_sets_each_as_likely(ratios: int) -> None:
    mixed = mixed_set(ratios=ratios)
    rows = Schedule("endpoints", 3, mixed, CLASSES).draw(torch.zeros(2000, dtype=torch.int64), draw())
    seen = torch.bincount(rows, minlength=len(mixed.images)).view_as(mixed.rows)
    ends = seen[:, [0, ratios - 1]]
    assert ends.sum() == 6000
    assert ends.min() > 0.7 * 6000 / ends.numel()


def test_endpoints_need_an_end() -> None:
    with pytest.raises(InputError, match=r"schedule 'endpoints' needs plan.ratios that begin with 0 or end with 1"):
        Schedule("endpoints", 2, mixed_set(ratios=(0.25, 0.5)), CLASSES).draw(torch.tensor([0]), draw())


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
