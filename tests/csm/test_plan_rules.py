"""The rules of ``auto``: their numbers, written out, and what they promise."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from csm.pairs import nearest_pairs
from csm.plan_rules import MOST, count_pairs, explain, mixed_images, near_classes, pair_policy, resolve_plan
from csm.planning import PlanConfig, make_plan


@pytest.mark.parametrize(
    ("train", "classes", "images"),
    [
        (1, 2, 32), (100, 10, 3200), (512, 10, 16_384), (539, 10, 16_384), (4096, 16, 16_384), (4097, 16, 16_388), (45_000, 10, 180_000),
        (300, 30, 9600), (959, 30, 30_688), (3000, 30, 30_720), (7680, 30, 30_720), (7681, 30, 30_724), (45_000, 100, 180_000),
        (10**5, 1000, 10**6), (10**7, 10, 10**6),
    ],
)  # fmt: skip
def test_mixed_images_for_so_many_real_ones(train: int, classes: int, images: int) -> None:
    assert mixed_images(train, classes) == images


@given(st.integers(1, 2_000_000), st.integers(2, 2000))
def test_more_real_images_or_classes_never_get_fewer_mixed_ones(train: int, classes: int) -> None:
    assert mixed_images(train, classes) <= mixed_images(train + 1, classes) <= MOST
    assert mixed_images(train, classes) <= mixed_images(train, classes + 1)
    assert mixed_images(train, classes) >= min(4 * train, MOST)


@pytest.mark.parametrize(("classes", "near"), [(2, 1), (5, 4), (17, 5), (32, 5), (33, 6), (100, 7), (200, 8), (1000, 10)])
def test_classes_near_each(classes: int, near: int) -> None:
    assert near_classes(classes) == near


def test_up_to_16_classes_all_pairs_are_mixed() -> None:
    assert [pair_policy(classes) for classes in (2, 16, 17, 1000)] == ["all", "all", "confusion", "confusion"]


@given(classes=st.integers(2, 16), train=st.integers(2, 3_000_000), ratios=st.integers(2, 30))
def test_there_are_as_many_images_as_the_rule_says_and_not_a_set_more(classes: int, train: int, ratios: int) -> None:
    plan = resolve_plan(PlanConfig(ratios=ratios), classes, train)
    round_of_sets = classes * (classes - 1) // 2 * ratios
    assert plan.sets >= 1
    images = mixed_images(train, classes)
    assert plan.sets * round_of_sets >= images
    assert plan.sets == 1 or (plan.sets - 1) * round_of_sets < images


def test_what_is_set_stays() -> None:
    given_ = PlanConfig(pairs="prototypes", pairs_per_class=2, sets_per_pair=3)
    assert resolve_plan(given_, 100, 10_000) == given_
    listed = resolve_plan(PlanConfig(pairs=((0, 1), (2, 3)), ratios=(0.0, 0.5, 1.0)), 4, 100)
    assert listed.pairs == ((0, 1), (2, 3))
    assert listed.sets == -(-3200 // (2 * 3))


def test_a_resolved_plan_is_resolved() -> None:
    for classes, train in ((10, 539), (100, 45_000)):
        once = resolve_plan(PlanConfig(), classes, train)
        assert "auto" not in (once.pairs, once.pairs_per_class, once.sets_per_pair)
        assert resolve_plan(once, 7, 1) == once
        assert explain(once, classes, train, 45) == []


def test_a_plan_that_is_not_resolved_has_no_rows() -> None:
    with pytest.raises(ValueError, match="sets_per_pair: expected a number, got 'auto'"):
        make_plan(3, "data", "net", PlanConfig())
    with pytest.raises(ValueError, match="pairs: expected those that were chosen by confusion, got None"):
        make_plan(17, "data", "net", PlanConfig(sets_per_pair=1))


def test_by_the_rules_the_demos_data_would_get_46_sets() -> None:
    assert resolve_plan(PlanConfig(), 10, 539).sets == 46  # 45 pairs x 46 sets x 8 ratios = 16,560
    lines = explain(PlanConfig(), 10, 539, 45)
    assert lines == [
        "pairs: all 45 of 10 classes, which are no more than 16",
        "46 sets for each of 45 pairs: 16,560 mixed images; the rule asks for 16,384 for 539 real ones",
    ]


@pytest.mark.parametrize(
    ("classes", "train", "line"),
    [
        (10, 100, "9 sets for each of 45 pairs: 3,240 mixed images; the rule asks for 32 for each of 100 real ones"),
        (10, 45_000, "500 sets for each of 45 pairs: 180,000 mixed images; the rule asks for 4 for each of 45,000 real ones"),
        (
            10,
            1_281_167,
            "2,778 sets for each of 45 pairs: 1,000,080 mixed images; the rule asks for 1,000,000 for 1,281,167 real ones",
        ),
    ],
)
def test_the_arithmetic_is_said(classes: int, train: int, line: str) -> None:
    assert explain(PlanConfig(pairs="all"), classes, train, 45) == [line]


def test_of_many_classes_the_near_ones_are_said() -> None:
    assert explain(PlanConfig(sets_per_pair=4), 1000, 10**6, 7000) == [
        "pairs: each of 1,000 classes with the 10 that the teacher takes it for most easily"
    ]


@pytest.mark.parametrize("dimensions", [2, 8, 32])
@pytest.mark.parametrize("classes", [17, 100, 400])
def test_the_near_classes_join_all_and_are_about_as_many_pairs_as_counted(classes: int, dimensions: int) -> None:
    near = near_classes(classes)
    for seed in range(5):
        points = torch.from_numpy(np.random.default_rng(seed).normal(size=(classes, dimensions)))
        pairs = nearest_pairs(torch.cdist(points, points), near).astype(int)
        graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(classes, classes))
        assert connected_components(graph, directed=False)[0] == 1
        assert 0.7 < count_pairs("confusion", classes, near) / len(pairs) < 1.4


def test_the_number_of_pairs_is_exact_where_it_can_be() -> None:
    assert count_pairs("all", 10, 5) == 45
    assert count_pairs([(0, 1), (3, 4)], 10, 5) == 2
    assert count_pairs("confusion", 6, 5) == 15  # no more than there are
    sizes = [count_pairs("prototypes", 100, near) for near in range(1, 100)]
    assert all(few <= many for few, many in pairwise(sizes))
