import math
from dataclasses import replace

import pytest
import torch

from csm.errors import InputError
from csm.schedules import SCHEDULES, Schedule, soften
from tests.csm.joined import CLASSES, draw, identity, mixed_set


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
