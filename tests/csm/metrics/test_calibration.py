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
from csm.metrics.calibration import aece, classwise_ece, ece, ks, l2_ce_debiased, mce, oe, top_label, ue

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


def equal_width_groups(pairs: list[tuple[float, bool]], n_bins: int) -> list[tuple[int, float, float]]:
    """(images, mean confidence, accuracy) of each bin that is not empty."""
    groups = [[(c, h) for c, h in pairs if b / n_bins < c <= (b + 1) / n_bins or (b == 0 and c == 0)] for b in range(n_bins)]
    return [(len(g), sum(c for c, _ in g) / len(g), sum(h for _, h in g) / len(g)) for g in groups if g]


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(1, 20))
def test_binned_errors_are_the_loops(case: tuple[Tensor, Tensor], n_bins: int) -> None:
    probs, labels = case
    n, k = probs.shape
    groups = equal_width_groups(top_labels_by_loop(*case), n_bins)
    close = {"abs": 1e-12}
    assert mce(*case, n_bins).item() == pytest.approx(max(abs(acc - conf) for _, conf, acc in groups), **close)
    assert oe(*case, n_bins).item() == pytest.approx(sum(m / n * c * max(c - a, 0) for m, c, a in groups), **close)
    assert ue(*case, n_bins).item() == pytest.approx(sum(m / n * c * max(a - c, 0) for m, c, a in groups), **close)
    classes = [equal_width_groups(list(zip(probs[:, c].tolist(), (labels == c).tolist(), strict=True)), n_bins) for c in range(k)]
    expected = sum(m / n * abs(acc - conf) for groups in classes for m, conf, acc in groups) / k
    assert classwise_ece(*case, n_bins).item() == pytest.approx(expected, **close)


@settings(max_examples=40, deadline=None)
@given(predictions())
def test_ks_is_the_loop_over_thresholds(case: tuple[Tensor, Tensor]) -> None:
    top = top_labels_by_loop(*case)
    expected = max(abs(sum(c - h for c, h in top if c <= s)) for s, _ in top) / len(top)
    assert ks(*case).item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(1, 20))
def test_debiased_error_is_the_loop(case: tuple[Tensor, Tensor], n_bins: int) -> None:
    top = sorted(top_labels_by_loop(*case), key=lambda pair: pair[0])
    total = 0.0
    for b in range(n_bins):
        group = [pair for i, pair in enumerate(top) if i * n_bins // len(top) == b]
        if group:
            m, conf, acc = len(group), *(sum(values) / len(group) for values in zip(*group, strict=True))
            total += m / len(top) * ((conf - acc) ** 2 - (acc * (1 - acc) / (m - 1) if m > 1 else 0))
    # Compared as squares: the root of a sum that is 0 but for rounding is not.
    assert l2_ce_debiased(*case, n_bins).item() ** 2 == pytest.approx(max(total, 0), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(predictions(), st.integers(1, 20))
def test_bounds_between_the_errors(case: tuple[Tensor, Tensor], n_bins: int) -> None:
    confidence, correct = top_label(*case)
    mean = (confidence - correct.double()).mean().abs().item()
    value = ece(*case, n_bins).item()
    assert mean - 1e-12 <= value <= mce(*case, n_bins).item() + 1e-12 <= 1 + 2e-12
    assert mean - 1e-12 <= ks(*case).item() <= 1
    assert oe(*case, n_bins).item() + ue(*case, n_bins).item() <= value + 1e-12
    # Each image's gaps over the classes sum to 2 at most.
    assert 0 <= classwise_ece(*case, n_bins).item() <= 2 / case[0].shape[1] + 1e-12
    assert 0 <= l2_ce_debiased(*case, n_bins).item() <= 1


@pytest.mark.parametrize("seed", range(2))
def test_mce_agrees_with_torchmetrics(seed: int) -> None:
    probs, labels = random_predictions(500, 5, seed)
    theirs = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=15, norm="max")
    assert mce(probs, labels).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_debiasing_removes_what_chance_adds() -> None:
    """Calibrated predictions: the plain squared error of 15 bins of 20 images is about 0.01, all of it chance."""
    squares, plain = [], []
    for seed in range(40):
        probs, labels = random_predictions(300, 3, seed)
        confidence, correct = (values.double().numpy() for values in top_label(probs, labels))
        parts = np.array_split(confidence.argsort(kind="stable"), 15)
        plain.append(np.mean([(confidence[p].mean() - correct[p].mean()) ** 2 for p in parts]))
        squares.append(l2_ce_debiased(probs, labels).item() ** 2)
    assert np.mean(plain) > 0.005
    assert np.mean(squares) < np.mean(plain) / 3  # not 0: those below 0 are raised to it


def test_known_values() -> None:
    case = pair_predictions((0.625, 8, 0), (0.875, 4, 4))
    assert mce(*case, 4).item() == pytest.approx(0.375)
    assert ks(*case).item() == pytest.approx(0.1875)  # 8 timid images of 16, then the bold ones take it back to 0
    assert ue(*case, 4).item() == pytest.approx(0.5 * 0.625 * 0.375)
    assert oe(*case, 4).item() == pytest.approx(0.5 * 0.875 * 0.375)
    assert classwise_ece(*case, 8).item() == pytest.approx(0.375)  # two classes that mirror each other
    assert l2_ce_debiased(*case, 2).item() == pytest.approx(((0.375**2 + 0.375**2 - 0.25 / 7) / 2) ** 0.5)
    assert l2_ce_debiased(*pair_predictions((0.75, 6, 2)), 1).item() == 0  # less than chance


def test_a_class_without_images_counts_in_classwise_ece() -> None:
    probs = torch.tensor([[0.75, 0.0, 0.25], [0.75, 0.0, 0.25]], dtype=torch.float64)
    assert classwise_ece(probs, torch.tensor([0, 0])).item() == pytest.approx((0.25 + 0 + 0.25) / 3)


def pair_predictions(*groups: tuple[float, int, int]) -> tuple[Tensor, Tensor]:
    """K = 2 predictions of class 0 from (confidence, correct, wrong) per group."""
    confidence = torch.cat([torch.full((right + wrong,), c) for c, right, wrong in groups]).double()
    labels = torch.cat([torch.tensor([0] * right + [1] * wrong) for _, right, wrong in groups])
    return torch.stack([confidence, 1 - confidence], dim=1), labels


@pytest.mark.parametrize("metric", [ece, aece, mce, oe, ue, l2_ce_debiased])
def test_perfectly_calibrated_is_zero(metric: Metric) -> None:
    assert metric(*pair_predictions((0.625, 5, 3), (0.75, 6, 2), (1.0, 8, 0)), 3).item() == 0


@pytest.mark.parametrize("metric", [ece, aece])
def test_a_known_gap_is_a_fraction_not_percent(metric: Metric) -> None:
    value = metric(*pair_predictions((0.625, 8, 0), (0.875, 4, 4)), 2)
    assert value.shape == ()
    assert value.dtype == torch.float64
    # 3/8 too timid and 3/8 too bold: two bins of equal mass, but one bin (1/2, 1], where the errors cancel.
    assert value.item() == pytest.approx(0.375 if metric is aece else 0.0)


@pytest.mark.parametrize("metric", [ece, aece, classwise_ece, mce, ks, oe, l2_ce_debiased])
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
