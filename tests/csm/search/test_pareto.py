import math

import numpy as np
import pytest

from csm.search.pareto import pareto_front

OBJECTIVES = ["nll", "accuracy", "ece"]
SIGNS = [1, -1, 1]


def oracle(values: list[list[float]]) -> list[bool]:
    """By comparing every pair."""
    front = []
    for mine in values:
        beaten = any(math.isnan(value) for value in mine)
        for other in values:
            pairs = [(sign * a, sign * b) for sign, a, b in zip(SIGNS, other, mine, strict=True)]
            if not any(math.isnan(a) for a, _ in pairs) and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs):
                beaten = True
        front.append(not beaten)
    return front


@pytest.mark.parametrize("seed", range(5))
def test_as_by_comparing_every_pair(seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 6, size=(60, 3)).astype(float)  # many are equal somewhere
    drawn[::13, seed % 3] = np.nan
    front = pareto_front(drawn.tolist(), OBJECTIVES)
    assert front == oracle(drawn.tolist())
    assert 0 < sum(front) < 60


def test_one_objective_keeps_the_best_ones() -> None:
    assert pareto_front([[0.5], [0.9], [0.9], [0.1]], ["accuracy"]) == [False, True, True, False]
    assert pareto_front([[0.5], [0.9], [0.9], [0.1]], ["ece"]) == [False, False, False, True]


def test_none_and_one_and_none_measured() -> None:
    assert pareto_front([], OBJECTIVES) == []
    assert pareto_front([[1.0, 2.0, 3.0]], OBJECTIVES) == [True]
    assert pareto_front([[math.nan, 2.0, 3.0], [math.inf, 1.0, 1.0]], OBJECTIVES) == [False, False]
