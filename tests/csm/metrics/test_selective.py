import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csm.metrics.selective import aurc


def two_class(confidence: list[float], correct: list[bool]) -> tuple[Tensor, Tensor]:
    first = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1), torch.tensor([0 if hit else 1 for hit in correct])


def by_loop(errors: list[float]) -> float:
    return sum(sum(errors[:n]) / n for n in range(1, len(errors) + 1)) / len(errors)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5000001, 1), st.booleans()), min_size=1, max_size=30, unique_by=lambda pair: pair[0]))
def test_aurc_is_the_loop_over_coverages(pairs: list[tuple[float, bool]]) -> None:
    ordered = sorted(pairs, reverse=True)
    expected = by_loop([float(not hit) for _, hit in ordered])
    assert aurc(*two_class(*map(list, zip(*pairs, strict=True)))).item() == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.6, 0.75, 1.0]), st.booleans()), min_size=1, max_size=6))
def test_ties_are_the_mean_over_all_orders(pairs: list[tuple[float, bool]]) -> None:
    orders = [sorted(order, key=lambda pair: -pair[0]) for order in itertools.permutations(pairs)]
    expected = sum(by_loop([float(not hit) for _, hit in order]) for order in orders) / len(orders)
    assert aurc(*two_class(*map(list, zip(*pairs, strict=True)))).item() == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]


def test_known_values() -> None:
    assert aurc(*two_class([1.0, 0.9, 0.8], [True] * 3)).item() == 0
    assert aurc(*two_class([1.0, 0.9, 0.8], [False] * 3)).item() == 1
    assert aurc(*two_class([1.0, 0.75], [True, False])).item() == 0.25  # risks 0 and 1/2
    assert aurc(*two_class([1.0, 0.75], [False, True])).item() == 0.75
    assert aurc(*two_class([0.75], [False])).item() == 1
