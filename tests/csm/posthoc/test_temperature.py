import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from csm.metrics import evaluate
from csm.posthoc import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_isotonic,
    apply_temperature,
    fit_isotonic,
    fit_temperature,
    fit_vector,
)

INF, NAN = float("inf"), float("nan")


def calibrated(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits whose softmax is the truth: labels are drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


def best_by_scipy(logits: Tensor, labels: Tensor) -> float:
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    found = minimize_scalar(
        lambda u: cross_entropy(logits.double() / math.exp(u), labels).item(),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return math.exp(found.x)


@pytest.mark.parametrize("scale", [0.03, 0.2, 1.0, 7.0, 50.0])
def test_a_known_factor_is_recovered(scale: float) -> None:
    logits, labels = calibrated(10_000, 4, seed=0)
    # T is 1.00 on the unscaled logits up to its standard error, about 2 % at this size.
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "k", "scale"), [(50, 2, 1.0), (300, 10, 5.0), (300, 100, 0.1)])
def test_agrees_with_scipy(n: int, k: int, scale: float, seed: int) -> None:
    logits, labels = calibrated(n, k, seed)
    assert fit_temperature(scale * logits, labels) == pytest.approx(best_by_scipy(scale * logits, labels), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_other_temperature_in_the_range_is_better(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 5))
    cells = st.floats(-50, 50, width=32)
    rows = st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n)
    logits = torch.tensor(data.draw(rows), dtype=torch.float64)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    temperature = fit_temperature(logits, labels)
    assert MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE
    reached = cross_entropy(logits / temperature, labels).item()
    for other in torch.logspace(-2, 2, 41, dtype=torch.float64).tolist():
        assert reached <= cross_entropy(logits / other, labels).item() + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 5.0))
def test_temperature_scales_with_the_logits_and_ignores_row_offsets(seed: int, factor: float) -> None:
    logits, labels = calibrated(60, 3, seed)
    temperature = fit_temperature(logits, labels)
    assume(0.1 < temperature < 10)
    moved = factor * (logits + torch.arange(60)[:, None])
    assert fit_temperature(moved, labels) == pytest.approx(factor * temperature, rel=1e-4)


def test_overconfident_logits_are_calibrated_by_the_fit() -> None:
    logits, labels = calibrated(5_000, 5, seed=1)
    before, after = (evaluate(4 * logits, labels, temperature=t) for t in (1.0, fit_temperature(4 * logits, labels)))
    assert before["ece"] > 0.15
    assert after["ece"] < 0.03
    assert after["nll"] < before["nll"]
    assert after["accuracy"] == before["accuracy"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_fit_inside_the_range_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    fit_temperature(*calibrated(100, 3, seed=0))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("margin", [1e-3, 1.0, 1e6])  # at 1e6 the softmax is saturated at every T of the range
def test_all_correct_gives_the_lower_end(margin: float, caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.tensor([0, 2, 1])
    logits = margin * torch.nn.functional.one_hot(labels, 3).double()
    assert fit_temperature(logits, labels) == MIN_TEMPERATURE
    (message,) = warnings_of(caplog)
    assert "temperature clamped to 0.01: all 3 predictions are correct" in message


def test_tiny_logits_give_the_lower_end(caplog: pytest.LogCaptureFixture) -> None:
    logits, labels = calibrated(500, 3, seed=0)
    assert fit_temperature(1e-4 * logits, labels) == MIN_TEMPERATURE
    assert warnings_of(caplog) == ["temperature clamped to 0.01: the NLL is lowest at or below it"]


@pytest.mark.parametrize("case", ["huge", "all wrong"])
def test_huge_or_misleading_logits_give_the_upper_end(case: str, caplog: pytest.LogCaptureFixture) -> None:
    logits, labels = calibrated(500, 3, seed=0)
    logits, labels = (1e4 * logits, labels) if case == "huge" else (logits, logits.argmin(dim=1))
    assert fit_temperature(logits, labels) == MAX_TEMPERATURE
    assert warnings_of(caplog) == ["temperature clamped to 100: the NLL is lowest at or above it"]


def test_equal_logits_leave_the_temperature_at_one(caplog: pytest.LogCaptureFixture) -> None:
    logits = torch.tensor([[2.0, 2.0], [-1.0, -1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 1.0
    (message,) = warnings_of(caplog)
    assert "cannot be fitted" in message


@pytest.mark.parametrize(("label", "expected"), [(0, MIN_TEMPERATURE), (1, MAX_TEMPERATURE)])
def test_a_single_sample_has_no_inner_minimum(label: int, expected: float) -> None:
    assert fit_temperature(torch.tensor([[2.0, 0.0]]), torch.tensor([label])) == expected


def test_two_samples_have_the_closed_form() -> None:
    # 3 of 4 right at the same logit gap g: sigmoid(g / T) = 3/4, so T = g / log 3.
    logits = torch.tensor([[5.0, 0.0]] * 4)
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(5 / math.log(3), rel=1e-7)


def test_a_class_without_samples() -> None:
    logits, labels = calibrated(400, 4, seed=2)
    logits, labels = logits[labels != 3], labels[labels != 3]
    assert fit_temperature(logits, labels) == pytest.approx(best_by_scipy(logits, labels), rel=1e-5)


def test_fit_runs_under_inference_mode_and_keeps_its_input() -> None:
    logits, labels = calibrated(100, 3, seed=0)
    copy = logits.clone()
    expected = fit_temperature(logits, labels)
    with torch.inference_mode():
        assert fit_temperature(logits.clone(), labels) == expected
    assert fit_temperature(logits.requires_grad_(), labels.to(torch.uint8)) == expected
    assert torch.equal(logits, copy)
    assert logits.grad is None


def test_fit_refuses() -> None:
    with pytest.raises(ValueError, match="logits must be finite, got nan or inf in 1 of 1 rows"):
        fit_temperature(torch.tensor([[0.0, math.nan]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, got values from 2 to 2"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"got \(0, 2\)"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0).long())


def test_apply_temperature_is_a_log_distribution_with_the_same_winner() -> None:
    logits, _ = calibrated(50, 4, seed=0)
    for temperature in (0.01, 1.0, 100.0):
        log_probs = apply_temperature(logits.float(), temperature)
        assert log_probs.dtype == torch.float64
        torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(50, dtype=torch.float64))
        assert torch.equal(log_probs.argmax(dim=1), logits.float().argmax(dim=1))
    torch.testing.assert_close(apply_temperature(logits, 2.0).exp(), (logits / 2).softmax(dim=1))


def test_apply_temperature_stays_finite_at_the_ends_of_float32() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0]])
    assert apply_temperature(logits, 0.01).isfinite().all()


def test_apply_temperature_passes_gradients() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    apply_temperature(logits, 2.0)[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.25, -0.25]]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_apply_temperature_refuses(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got"):
        apply_temperature(torch.zeros(1, 2), temperature)


@pytest.mark.parametrize(("n", "k", "scale"), [(50, 2, 1.0), (300, 10, 0.1), (300, 10, 40.0), (200, 30, 5.0)])
def test_vector_scaling_is_where_the_slope_vanishes(n: int, k: int, scale: float) -> None:
    """The penalised NLL is strictly convex, so that is its one minimum."""
    logits, labels = calibrated(n, k, seed=1)
    z, temperature = (scale * logits).log_softmax(dim=1), scale
    weights, biases = (values.requires_grad_() for values in fit_vector(z, labels, temperature))
    nll = cross_entropy(weights * z + biases, labels, reduction="sum")
    (nll + 0.5 * ((weights * temperature - 1).square().sum() + biases.square().sum())).backward()
    assert weights.grad is not None
    assert biases.grad is not None
    assert (weights.grad / temperature).abs().max() < 1e-5
    assert biases.grad.abs().max() < 1e-5


def test_vector_scaling_recovers_weights_and_biases_from_many_samples() -> None:
    logits, labels = calibrated(40_000, 3, seed=0)
    weights, biases = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor([0.4, 0.0, -0.4], dtype=torch.float64)
    truth = logits.log_softmax(dim=1)
    labels = torch.multinomial((weights * truth + biases).softmax(dim=1), 1, generator=torch.Generator().manual_seed(1)).squeeze(
        1
    )
    found_weights, found_biases = fit_vector(truth, labels)
    assert found_weights.tolist() == pytest.approx(weights.tolist(), rel=0.1)
    assert (found_biases - found_biases[1]).tolist() == pytest.approx(biases.tolist(), abs=0.1)


def test_vector_scaling_of_a_class_that_is_never_mistaken_stays_finite() -> None:
    z = torch.tensor([[0.0, -9.0], [-9.0, 0.0]], dtype=torch.float64).repeat(20, 1)
    weights, biases = fit_vector(z, torch.tensor([0, 1]).repeat(20))
    assert (weights > 0).all()
    assert (weights < 10).all()
    assert biases.abs().max() < 1


def best_by_pooling(outcomes: list[float]) -> list[float]:
    """Isotonic regression as its min-max formula says: max over starts up to i of min over ends from i of the mean."""
    n = len(outcomes)
    means = {(a, b): float(np.mean(outcomes[a : b + 1])) for a in range(n) for b in range(a, n)}
    return [max(min(means[a, b] for b in range(i, n)) for a in range(i + 1)) for i in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_isotonic_regression_is_its_min_max_formula_within_the_floor(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores = np.sort(draw.normal(size=30))
    outcomes = (draw.random(30) < 1 / (1 + np.exp(-2 * scores))).astype(float)
    order = draw.permutation(30)
    knots = fit_isotonic(torch.from_numpy(scores[order]), torch.from_numpy(outcomes[order]))
    found = apply_isotonic(torch.from_numpy(scores), knots)
    assert found.tolist() == pytest.approx(np.clip(best_by_pooling(outcomes.tolist()), 1 / 32, 31 / 32).tolist(), abs=1e-9)


def test_between_and_beyond_the_knots() -> None:
    knots = ((-1.0, 0.1), (0.0, 0.1), (2.0, 0.7))
    scores = torch.tensor([[-INF, -1.0, -0.5], [1.0, 2.0, INF]])
    assert apply_isotonic(scores, knots).flatten().tolist() == pytest.approx([0.1, 0.1, 0.1, 0.4, 0.7, 0.7])
    assert apply_isotonic(torch.tensor([-3.0, 5.0]), knots[2:]).tolist() == pytest.approx([0.7, 0.7])
    assert apply_isotonic(torch.tensor([NAN]), knots).isnan().all()
    assert apply_isotonic(torch.tensor([NAN]), knots[2:]).isnan().all()


def test_scores_that_are_all_equal_get_the_mean_outcome() -> None:
    knots = fit_isotonic(torch.ones(4), torch.tensor([0, 0, 0, 1]))
    assert apply_isotonic(torch.tensor([-1.0, 1.0, 7.0]), knots).tolist() == pytest.approx([0.25] * 3)
