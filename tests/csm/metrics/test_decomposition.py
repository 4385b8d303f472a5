import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csm.metrics.decomposition import brier_reliability, brier_resolution, brier_uncertainty
from csm.metrics.scores import brier


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Whole-number logits: rows repeat, probabilities of exactly 0 and 1 and on bin edges; classes without images."""
    n, k = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    cells = st.sampled_from([-800, -2, -1, 0, 1, 2, 800])
    logits = draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    return torch.tensor(logits, dtype=torch.float64).softmax(dim=1), torch.tensor(labels)


def by_loop(probs: Tensor, labels: Tensor, n_bins: int) -> tuple[float, float, float, float]:
    """Reliability, resolution, uncertainty and the two within-bin terms (WBV - WBC), as Stephenson et al. write them."""
    n, k = probs.shape
    reliability = resolution = uncertainty = within = 0.0
    for c in range(k):
        pairs = [(p, float(y == c)) for p, y in zip(probs[:, c].tolist(), labels.tolist(), strict=True)]
        base = sum(o for _, o in pairs) / n
        uncertainty += base * (1 - base)
        for b in range(n_bins):
            group = [(p, o) for p, o in pairs if b / n_bins < p <= (b + 1) / n_bins or (b == 0 and p == 0)]
            if group:
                mean, frequency = (sum(values) / len(group) for values in zip(*group, strict=True))
                reliability += len(group) / n * (mean - frequency) ** 2
                resolution += len(group) / n * (frequency - base) ** 2
                within += sum((p - mean) ** 2 - 2 * (p - mean) * (o - frequency) for p, o in group) / n
    return reliability, resolution, uncertainty, within


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(1, 20))
def test_parts_are_the_loops_and_add_up(case: tuple[Tensor, Tensor], n_bins: int) -> None:
    reliability, resolution, uncertainty, within = by_loop(*case, n_bins)
    assert brier_reliability(*case, n_bins).item() == pytest.approx(reliability, abs=1e-12)
    assert brier_resolution(*case, n_bins).item() == pytest.approx(resolution - within, abs=1e-12)
    assert brier_uncertainty(*case).item() == pytest.approx(uncertainty, abs=1e-12)
    assert brier(*case).item() == pytest.approx(reliability - (resolution - within) + uncertainty, abs=1e-12)


def test_forecasting_the_class_frequencies_is_all_uncertainty() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).repeat(4, 1)
    assert brier_reliability(probs, labels).item() == pytest.approx(0)
    assert brier_resolution(probs, labels).item() == pytest.approx(0)
    assert brier_uncertainty(probs, labels).item() == brier(probs, labels).item() == 0.625


def test_certain_predictions() -> None:
    right, wrong = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1])
    assert [f(right, labels).item() for f in (brier_reliability, brier_resolution, brier_uncertainty)] == [0, 0.5, 0.5]
    # Turned round: told apart as well as before, with every probability wrong.
    assert [f(wrong, labels).item() for f in (brier_reliability, brier_resolution, brier_uncertainty)] == [2, 0.5, 0.5]


def test_more_bins_do_not_change_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(200, 5, generator=generator).softmax(dim=1)
    labels = torch.randint(0, 5, (200,), generator=generator)
    for n_bins in (1, 7, 100):
        total = (
            brier_reliability(probs, labels, n_bins) - brier_resolution(probs, labels, n_bins) + brier_uncertainty(probs, labels)
        )
        assert total.item() == pytest.approx(brier(probs, labels).item(), abs=1e-12)
