from itertools import combinations

import numpy as np
import pytest
import torch

from csm.errors import InputError
from csm.pairs import all_pairs, confusion_distances, listed_pairs, nearest_pairs, prototype_distances

NAMES = ("cat", "dog", "7", "0")


def random_distances(n_classes: int, seed: int = 0, levels: int | None = None) -> torch.Tensor:
    """Symmetric; with ``levels``, whole numbers, so that many are equal."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.rand(n_classes, n_classes, generator=draw, dtype=torch.float64)
    if levels:
        half = (half * levels).floor()
    upper = half.triu(1)
    return upper + upper.T


def brute_force(distance: list[list[float]], per_class: int) -> list[tuple[int, int]]:
    pairs = set()
    for one in range(len(distance)):
        others = sorted((distance[one][other], other) for other in range(len(distance)) if other != one)
        pairs |= {(min(one, other), max(one, other)) for _, other in others[:per_class]}
    return sorted(pairs)


def as_tuples(pairs: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in pairs.tolist()]


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_all_pairs_are_the_combinations_in_order(n_classes: int) -> None:
    pairs = all_pairs(n_classes)
    assert as_tuples(pairs) == list(combinations(range(n_classes), 2))
    assert pairs.dtype == np.uint16


def test_a_thousand_classes_have_499500_pairs() -> None:
    pairs = all_pairs(1000)
    assert len(pairs) == 499_500
    assert pairs[-1].tolist() == [998, 999]


def test_listed_pairs_keep_their_order_and_are_turned_to_rise() -> None:
    assert as_tuples(listed_pairs([(3, 1), (0, 2), (2, 1)], 4)) == [(1, 3), (0, 2), (1, 2)]


def test_a_text_is_a_name_and_a_number_an_index() -> None:
    # The class that is named "0" has index 3, and the one with index 0 is named "cat".
    assert as_tuples(listed_pairs([("dog", "cat"), ("0", 0), (2, "0"), ("7", 1)], 4, NAMES)) == [(0, 1), (0, 3), (2, 3), (1, 2)]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"plan.pairs: no class is named 'cow'; the classes are cat, dog, 7, 0$"):
        listed_pairs([("cat", "cow")], 4, NAMES)


def test_of_many_names_the_first_ten_are_shown() -> None:
    with pytest.raises(InputError, match=r"the classes are n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, \.\.\.$"):
        listed_pairs([("cat", "n0")], 11, [f"n{number}" for number in range(11)])


@pytest.mark.parametrize("pair", [("cat", "cat"), ("cat", 0), (1, 1), (0, 4), (-1, 0)])
def test_a_pair_of_no_two_classes_is_refused_as_it_was_written(pair: tuple[int | str, int | str]) -> None:
    with pytest.raises(InputError) as caught:
        listed_pairs([pair], 4, NAMES)
    assert str(caught.value) == f"plan.pairs: {list(pair)} is not a pair of two different classes of 0..3"


@pytest.mark.parametrize("pairs", [[], [(0, 1), (1, 0)], [(0, 1), ("cat", "dog")]], ids=["none", "reversed", "by name"])
def test_listed_pairs_must_be_different(pairs: list[tuple[int | str, int | str]]) -> None:
    with pytest.raises(InputError, match=r"plan.pairs: expected different pairs, at least one"):
        listed_pairs(pairs, 4, NAMES)


@pytest.mark.parametrize("levels", [None, 3, 1], ids=["all different", "many ties", "all equal"])
@pytest.mark.parametrize(("n_classes", "per_class"), [(2, 1), (3, 1), (3, 2), (12, 1), (12, 3), (12, 11)])
def test_nearest_pairs_are_those_of_a_search_by_hand(n_classes: int, per_class: int, levels: int | None) -> None:
    distance = random_distances(n_classes, seed=per_class, levels=levels)
    pairs = nearest_pairs(distance, per_class)
    assert as_tuples(pairs) == brute_force(distance.tolist(), per_class)
    assert pairs.dtype == np.uint16


def test_every_class_has_at_least_its_nearest_and_a_popular_one_more() -> None:
    places = torch.tensor([0.0, 1.0, -1.2, 1.5, 100.0])  # all are nearest to 0 or 1, and nobody to the last
    pairs = nearest_pairs((places[:, None] - places).abs(), 1)
    assert as_tuples(pairs) == [(0, 1), (0, 2), (1, 3), (3, 4)]


def test_all_others_are_all_pairs() -> None:
    assert np.array_equal(nearest_pairs(random_distances(9), 8), all_pairs(9))


def test_the_diagonal_has_no_part() -> None:
    distance = random_distances(6)
    assert np.array_equal(nearest_pairs(distance - 5 * torch.eye(6), 2), nearest_pairs(distance + 5 * torch.eye(6), 2))


def test_distances_below_zero_have_their_order() -> None:
    distance = random_distances(6)
    assert np.array_equal(nearest_pairs(distance - 7, 2), nearest_pairs(distance, 2))


@pytest.mark.parametrize("per_class", [0, 4, 100])
def test_no_class_has_so_many_others(per_class: int) -> None:
    with pytest.raises(InputError, match=rf"plan.pairs_per_class: expected 1 to 3 for 4 classes, got {per_class}"):
        nearest_pairs(random_distances(4), per_class)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_distance_that_is_no_number_is_refused(value: float) -> None:
    distance = random_distances(4)
    distance[1, 2] = value
    with pytest.raises(InputError, match="not finite"):
        nearest_pairs(distance, 1)


def test_prototype_distances_are_euclidean_even_of_far_and_close_points() -> None:
    prototypes = torch.tensor([[1e6, 0.0, 0.0], [1e6, 0.0, 1.0], [0.0, -2.0, 0.5]])
    distance = prototype_distances(prototypes)
    by_hand = [
        [sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) ** 0.5 for q in prototypes.tolist()] for p in prototypes.tolist()
    ]
    assert np.allclose(distance.numpy(), by_hand, rtol=1e-12)
    assert distance[0, 1] == 1.0


def test_confusion_is_the_mean_posterior_of_the_other_class_both_ways() -> None:
    draw = torch.Generator().manual_seed(1)
    posterior = torch.rand(20, 4, generator=draw).softmax(dim=1)
    labels = torch.arange(20) % 4
    distance = confusion_distances(posterior.log(), labels, 4)
    for a, b in combinations(range(4), 2):
        a_as_b = np.mean([p[b] for p, label in zip(posterior.tolist(), labels.tolist(), strict=True) if label == a])
        b_as_a = np.mean([p[a] for p, label in zip(posterior.tolist(), labels.tolist(), strict=True) if label == b])
        assert distance[a, b].item() == pytest.approx(-(a_as_b + b_as_a), rel=1e-6)
        assert distance[a, b] == distance[b, a]


def test_a_large_class_is_not_confusing_because_it_is_large() -> None:
    # 1 of 100 images of class 0 is taken for class 1; 1 of 2 images of class 2 is taken for class 1.
    certain = torch.eye(3).clamp(min=1e-9).log()
    rows = [certain[0]] * 99 + [certain[1]] + [certain[1]] * 4 + [certain[2], certain[1]]
    labels = torch.tensor([0] * 100 + [1] * 4 + [2] * 2)
    assert as_tuples(nearest_pairs(confusion_distances(torch.stack(rows), labels, 3), 1)) == [(0, 1), (1, 2)]


def test_classes_that_are_never_taken_for_each_other_are_still_in_order() -> None:
    # Every top class is right; class 0 keeps more mass for 3 than for the others.
    posterior = torch.full((4, 4), 0.01) + torch.eye(4) * 0.96
    posterior[0] = torch.tensor([0.9, 0.02, 0.01, 0.07])
    assert (posterior.argmax(dim=1) == torch.arange(4)).all()
    distance = confusion_distances(posterior.log(), torch.arange(4), 4)
    assert distance[0, 1:].tolist() == pytest.approx([-0.03, -0.02, -0.08])


def test_a_posterior_of_zero_is_no_confusion() -> None:
    log_posterior = torch.eye(3).log()  # -inf off the diagonal
    assert confusion_distances(log_posterior, torch.arange(3), 3).tolist() == [[-2, 0, 0], [0, -2, 0], [0, 0, -2]]


def test_a_class_without_an_image_is_named() -> None:
    with pytest.raises(InputError, match=r"plan.pairs: class 1 has no validation image"):
        confusion_distances(torch.zeros(2, 3), torch.tensor([0, 2]), 3)
