from collections.abc import Callable

import numpy as np
import pytest
import relplot
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from csm.metrics import METRICS
from csm.metrics.calibration import aece, ece, top_label

Metric = Callable[..., Tensor]


def random_predictions(n: int, k: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (scale * torch.randn(n, k, generator=generator, dtype=torch.float64)).softmax(dim=1)
    # Labels drawn from the rows: the gaps of the bins then differ in sign, and a sample in a wrong bin shows.
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(1)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Whole-number logits, so that rows repeat, classes tie, and confidences fall on bin edges."""
    n, k = draw(st.integers(1, 30)), draw(st.integers(2, 6))
    cells = st.sampled_from([-800, -2, -1, 0, 1, 2, 800])  # +-800: probabilities of exactly 0 and 1
    logits = draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    return torch.tensor(logits, dtype=torch.float64).softmax(dim=1), torch.tensor(labels)


def gap_by_loop(groups: list[list[tuple[float, bool]]], n: int) -> float:
    """sum_b n_b/N |acc_b - conf_b|, with n_b cancelled."""
    return sum(abs(sum(hit for _, hit in g) - sum(c for c, _ in g)) for g in groups) / n


def top_labels_by_loop(probs: Tensor, labels: Tensor) -> list[tuple[float, bool]]:
    rows = zip(probs.tolist(), labels.tolist(), strict=True)
    return [(max(row), row.index(max(row)) == label) for row, label in rows]


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(1, 20))
def test_ece_is_the_loop(case: tuple[Tensor, Tensor], n_bins: int) -> None:
    top = top_labels_by_loop(*case)
    groups = [[(c, h) for c, h in top if b / n_bins < c <= (b + 1) / n_bins] for b in range(n_bins)]
    assert ece(*case, n_bins).item() == pytest.approx(gap_by_loop(groups, len(top)), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(1, 20))
def test_aece_is_the_loop(case: tuple[Tensor, Tensor], n_bins: int) -> None:
    top = sorted(top_labels_by_loop(*case), key=lambda pair: pair[0])
    groups = [[p for i, p in enumerate(top) if i * n_bins // len(top) == b] for b in range(n_bins)]
    assert aece(*case, n_bins).item() == pytest.approx(gap_by_loop(groups, len(top)), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "k", "n_bins"), [(500, 10, 15), (500, 2, 15), (200, 100, 10), (7, 3, 15), (1, 2, 5)])
def test_ece_agrees_with_torchmetrics_and_relplot(n: int, k: int, n_bins: int, seed: int) -> None:
    probs, labels = random_predictions(n, k, seed)
    value = ece(probs, labels, n_bins).item()
    theirs = multiclass_calibration_error(probs, labels, num_classes=k, n_bins=n_bins)
    assert value == pytest.approx(theirs.item(), abs=1e-6)  # computed in float32
    confidence, correct = relplot.multiclass_logits_to_confidences(probs.numpy(), labels.numpy(), probs=True)
    assert value == pytest.approx(relplot.metrics.binnedECE(confidence, correct, n_bins), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_aece_agrees_with_array_split(seed: int) -> None:
    probs, labels = random_predictions(150, 5, seed)
    confidence, correct = relplot.multiclass_logits_to_confidences(probs.numpy(), labels.numpy(), probs=True)
    parts = np.array_split(confidence.argsort(), 15)
    expected = np.mean([abs(confidence[part].mean() - correct[part].mean()) for part in parts])
    assert aece(probs, labels, 15).item() == pytest.approx(expected, abs=1e-12)


def pair_predictions(*groups: tuple[float, int, int]) -> tuple[Tensor, Tensor]:
    """K = 2 predictions of class 0 from (confidence, correct, wrong) per group."""
    confidence = torch.cat([torch.full((right + wrong,), c) for c, right, wrong in groups]).double()
    labels = torch.cat([torch.tensor([0] * right + [1] * wrong) for _, right, wrong in groups])
    return torch.stack([confidence, 1 - confidence], dim=1), labels


@pytest.mark.parametrize("metric", [ece, aece])
def test_perfectly_calibrated_is_zero(metric: Metric) -> None:
    assert metric(*pair_predictions((0.625, 5, 3), (0.75, 6, 2), (1.0, 8, 0)), 3).item() == 0


@pytest.mark.parametrize("metric", [ece, aece])
def test_a_known_gap_is_a_fraction_not_percent(metric: Metric) -> None:
    value = metric(*pair_predictions((0.625, 8, 0), (0.875, 4, 4)), 2)
    assert value.shape == ()
    assert value.dtype == torch.float64
    # 3/8 too timid and 3/8 too bold: two bins of equal mass, but one bin (1/2, 1], where the errors cancel.
    assert value.item() == pytest.approx(0.375 if metric is aece else 0.0)


@pytest.mark.parametrize("metric", [ece, aece])
def test_certain_and_wrong_is_one(metric: Metric) -> None:
    probs = torch.tensor([[1.0, 0.0]] * 4)
    assert metric(probs, torch.ones(4, dtype=torch.long)).item() == 1
    assert metric(probs, torch.zeros(4, dtype=torch.long)).item() == 0


@pytest.mark.parametrize("k", [2, 3, 5, 10, 15])
def test_uniform_rows_predict_class_0_with_confidence_1_over_k(k: int) -> None:
    probs = torch.zeros(4 * k, k, dtype=torch.float64).softmax(dim=1)
    labels = torch.arange(4 * k) % k
    confidence, correct = top_label(probs, labels)
    assert confidence.tolist() == [1 / k] * (4 * k)
    assert correct.sum() == 4
    assert ece(probs, labels).item() == pytest.approx(0, abs=1e-12)  # right once in k: calibrated


def test_single_sample() -> None:
    probs, labels = torch.tensor([[0.25, 0.75]]), torch.tensor([0])
    assert ece(probs, labels).item() == aece(probs, labels).item() == 0.75


def test_a_class_without_samples_changes_nothing() -> None:
    probs, labels = random_predictions(100, 4, seed=0)
    wider = torch.cat([probs, torch.zeros(100, 1, dtype=torch.float64)], dim=1)
    assert ece(wider, labels).item() == ece(probs, labels).item()
    assert aece(wider, labels).item() == aece(probs, labels).item()


def test_aece_keeps_the_least_confident_sample() -> None:
    probs, labels = pair_predictions((0.5, 0, 1), (1.0, 4, 0))
    assert aece(probs, labels, 5).item() == pytest.approx(0.5 / 5)


def test_confidence_rounded_above_one_is_one() -> None:
    probs = torch.tensor([[1.0000001, 0.0]])
    assert probs.max() > 1
    assert top_label(probs, torch.tensor([0]))[0].tolist() == [1.0]
    assert ece(probs, torch.tensor([0])).item() == 0


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.binned])
def test_wrong_number_of_bins(name: str) -> None:
    probs, labels = random_predictions(5, 3, seed=0)
    with pytest.raises(ValueError, match="n_bins must be an int > 0, got -1"):
        METRICS[name].function(probs, labels, -1)
