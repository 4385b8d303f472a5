"""Truncated posteriors: what is stored, what it stands for, and the bound on what a temperature makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csm.errors import InputError
from csm.reannotation.truncation import complete, stored_classes, truncate


def posteriors(rows: int = 40, classes: int = 12, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    scores = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, classes)) * spread)
    return scores.log_softmax(dim=1).float()


@pytest.mark.parametrize(
    ("classes", "top", "stored"),
    [
        (10, None, None),
        (100, None, None),
        (101, None, 32),
        (200, None, 32),
        (1000, None, 125),
        (1000, 1000, None),
        (1000, 5, 5),
        (10, 3, 3),
        (3, 3, None),
    ],
)
def test_how_many_classes_are_stored(classes: int, top: int | None, stored: int | None) -> None:
    assert stored_classes(classes, top) == stored


def test_more_classes_than_there_are_cannot_be_stored() -> None:
    with pytest.raises(InputError, match=r"^annotate\.top: expected at most the 3 classes of the data, got 4$"):
        stored_classes(3, 4)


@pytest.mark.parametrize("top", [1, 3, 11])
def test_the_most_probable_classes_are_kept_and_the_others_share_what_is_left(top: int) -> None:
    said = posteriors()
    stored = truncate(said, top)
    whole = complete(stored, 12).double().exp().numpy()
    for row, probs in zip(whole, said.double().exp().numpy(), strict=True):
        order = np.argsort(-probs)
        expected = probs.copy()
        expected[order[top:]] = probs[order[top:]].sum() / (12 - top)
        assert row == pytest.approx(expected, rel=1e-5)
        assert row.sum() == pytest.approx(1, abs=1e-5)
    assert (stored.log_posterior.diff(dim=1) <= 0).all()


def test_what_is_left_keeps_its_digits_where_one_minus_a_sum_has_none() -> None:
    said = torch.tensor([[0.0, -40.0, -41.0, -42.0]])
    assert truncate(said, 1).log_rest.item() == pytest.approx(np.logaddexp.reduce([-40.0, -41.0, -42.0]))


def test_nothing_left_is_nothing_for_each() -> None:
    said = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert complete(truncate(said, 1), 3).exp().tolist() == [[1.0, 0.0, 0.0]]


@given(st.integers(0, 10_000), st.integers(3, 30), st.floats(0.1, 12.0), st.floats(0.1, 20.0), st.data())
def test_the_bound_on_what_a_temperature_makes_of_it_holds(
    seed: int, classes: int, spread: float, temperature: float, data: st.DataObject
) -> None:
    top = data.draw(st.integers(1, classes - 1))
    said = posteriors(20, classes, spread, seed).double()
    stored = truncate(said, top)
    label = (complete(stored, classes).double() / temperature).softmax(dim=1)
    whole = (said / temperature).softmax(dim=1)
    lost = (label - whole).abs().sum(dim=1) / 2
    t = 1 / temperature
    kept, rest = (t * stored.log_posterior.double()).exp().sum(dim=1), stored.log_rest.double().exp()
    if t <= 1:
        others = (classes - top) ** (1 - t) * rest**t
    else:
        others = rest * stored.log_posterior[:, -1].double().exp() ** (t - 1)
    assert (lost <= others / (kept + others) + 1e-6).all()


@pytest.mark.parametrize(("temperature", "most"), [(0.5, 1e-4), (1.0, 1e-3), (1.5, 0.01), (2.0, 0.03)])
def test_of_a_thousand_classes_the_default_loses_little(temperature: float, most: float) -> None:
    """Classes at random in 12 dimensions, read right five times in six."""
    draw = np.random.default_rng(0)
    means, deviation = draw.normal(size=(1000, 12)), 0.6
    points = means[draw.integers(0, 1000, 500)] + deviation * draw.normal(size=(500, 12))
    square = (points**2).sum(axis=1)[:, None] - 2 * points @ means.T + (means**2).sum(axis=1)
    said = torch.from_numpy(-square / (2 * deviation**2)).log_softmax(dim=1)
    label = (complete(truncate(said, stored_classes(1000, None) or 0), 1000).double() / temperature).softmax(dim=1)
    lost = (label - (said / temperature).softmax(dim=1)).abs().sum(dim=1) / 2
    assert lost.mean() < most
