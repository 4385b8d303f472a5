import math

import numpy as np
import pytest
import relplot
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from csm.metrics import smoothing
from csm.metrics.calibration import top_label
from csm.metrics.smoothing import NARROWEST, smooth_ece, smooth_reliability, smooth_reliability_band

GRID = torch.linspace(0, 1, 41, dtype=torch.float64)


def kernel(t: NDArray[np.float64], c: NDArray[np.float64], bandwidth: float) -> NDArray[np.float64]:
    """(T, N): the Gaussian at t of each image and of its reflections at 0 and 1."""
    far = np.arange(-6, 7, 2)
    places = np.concatenate([c[:, None] + far, -c[:, None] + far], axis=1)  # (N, images)
    z = (t[:, None, None] - places) / bandwidth
    return np.exp(-(z**2) / 2).sum(axis=2) / (bandwidth * math.sqrt(2 * math.pi))


def error_by_quadrature(c: NDArray[np.float64], gap: NDArray[np.float64], bandwidth: float) -> float:
    t = (np.arange(8000) + 0.5) / 8000
    return float(np.abs(kernel(t, c, bandwidth) @ gap / len(c)).mean())


def random_predictions(n: int, k: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels drawn from tempered rows: overconfident for scale > 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    return (scale * logits).softmax(dim=1), torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


@st.composite
def two_class(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    confidence = st.one_of(st.floats(0.5, 1), st.sampled_from([0.5, 0.75, 1.0]))
    pairs = draw(st.lists(st.tuples(confidence, st.booleans()), min_size=1, max_size=25))
    first = torch.tensor([c for c, _ in pairs], dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1), torch.tensor([int(not hit) for _, hit in pairs])


@settings(max_examples=25, deadline=None)
@given(two_class())
def test_smooth_ece_is_the_fixed_point_of_the_integral(case: tuple[Tensor, Tensor]) -> None:
    confidence, correct = top_label(*case)
    c, gap = confidence.numpy(), (correct.double() - confidence).numpy()
    value = smooth_ece(*case).item()
    assert abs(gap.mean()) - 1e-9 <= value <= np.abs(gap).mean() + 1e-9
    if value > 0.01:  # a kernel that 8,000 points can follow
        assert error_by_quadrature(c, gap, value) == pytest.approx(value, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0, 0.5])
@pytest.mark.parametrize(("n", "k"), [(40, 2), (700, 10), (5000, 100)])
def test_smooth_ece_agrees_with_relplot(n: int, k: int, scale: float) -> None:
    probs, labels = random_predictions(n, k, scale, seed=n)
    # relplot counts what falls into the last cell before 1 by half, and that is most of an overconfident network.
    probs = 0.97 * probs + 0.03 / k
    confidence, correct = relplot.multiclass_logits_to_confidences(probs.numpy(), labels.numpy(), probs=True)
    theirs, width = relplot.smECE(confidence, correct, return_width=True)
    # Their bandwidth is a multiple of 2^-10, and they return the value there.
    assert smooth_ece(probs, labels).item() == pytest.approx(theirs, rel=0.005, abs=1e-3)
    assert smooth_reliability(*top_label(probs, labels), GRID).bandwidth == pytest.approx(width, abs=2e-3)


@pytest.mark.parametrize("bandwidth", [NARROWEST, 0.01, 0.1, 0.6])
def test_the_grid_follows_the_kernel_at_any_bandwidth(bandwidth: float) -> None:
    c = np.array([0.0, 0.3, 0.30001, 0.7, 1.0])
    gap = np.array([1.0, -1.0, 0.5, 0.25, -0.5])
    spectrum = smoothing._spectrum(smoothing._gather(torch.from_numpy(c), torch.from_numpy(gap) / 5))
    nodes = np.arange(smoothing.CELLS + 1) / smoothing.CELLS
    exact = kernel(nodes, c, bandwidth) @ gap / 5
    np.testing.assert_allclose(smoothing._smooth(spectrum, bandwidth), exact, atol=0.01 * np.abs(exact).max())
    assert smoothing._error(spectrum, bandwidth).item() == pytest.approx(
        np.trapezoid(np.abs(exact), dx=1 / smoothing.CELLS), rel=2e-3
    )


def test_known_values_of_smooth_ece() -> None:
    certain = torch.tensor([[1.0, 0.0]] * 4)
    assert smooth_ece(certain, torch.zeros(4).long()).item() == 0
    assert smooth_ece(certain, torch.ones(4).long()).item() == pytest.approx(1, abs=1e-12)
    assert smooth_ece(torch.tensor([[0.25, 0.75]]), torch.tensor([0])).item() == pytest.approx(0.75, abs=1e-9)
    # Gaps of one sign: the kernel moves them about, their sum stays.
    assert smooth_ece(torch.tensor([[0.75, 0.25], [0.99, 0.01]]), torch.tensor([0, 0])).item() == pytest.approx(0.13, abs=1e-7)
    # Half of one confidence right, as it says.
    assert smooth_ece(torch.tensor([[0.5, 0.5]] * 4), torch.tensor([0, 1, 0, 1])).item() == pytest.approx(0, abs=1e-12)


def test_curve_is_the_kernel_regression_of_the_gaps() -> None:
    confidence, correct = top_label(*random_predictions(300, 5, 0.9, seed=1))
    accuracy, density, bandwidth = smooth_reliability(confidence, correct, GRID)
    weights = kernel(GRID.numpy(), confidence.numpy(), bandwidth)
    np.testing.assert_allclose(density, weights.mean(axis=1), atol=1e-4 * weights.mean(axis=1).max())
    expected = GRID.numpy() + weights @ (correct.double() - confidence).numpy() / weights.sum(axis=1)
    seen = ~accuracy.isnan().numpy()
    count = weights.sum(axis=1) * bandwidth * math.sqrt(2 * math.pi)
    np.testing.assert_array_equal(seen, count >= smoothing.LEAST_WEIGHT)
    assert 10 < seen.sum() < len(GRID)
    np.testing.assert_allclose(accuracy[seen], expected[seen].clip(0, 1), atol=1e-3)


def test_curve_agrees_with_relplot() -> None:
    confidence, correct = top_label(*random_predictions(2000, 3, 1.5, seed=2))
    curve = smooth_reliability(confidence, correct, GRID)
    theirs, _ = relplot.kernels.ReflectedGaussianKernel(curve.bandwidth).smooth(
        confidence.numpy(), (correct.double() - confidence).numpy(), GRID.numpy()
    )
    dense = curve.density > 0.3  # theirs leans towards the diagonal where there is little
    np.testing.assert_allclose(curve.accuracy[dense], (theirs + GRID.numpy())[dense], atol=3e-3)


def test_distance_from_the_diagonal_is_smooth_ece() -> None:
    probs, labels = random_predictions(500, 4, 2.0, seed=3)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    accuracy, density, _ = smooth_reliability(*top_label(probs, labels), grid)
    area = torch.trapezoid(((accuracy - grid).abs() * density).nan_to_num(), grid).item()
    assert area == pytest.approx(smooth_ece(probs, labels).item(), rel=0.02)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 0.5])
def test_a_single_image(confidence: float) -> None:
    accuracy, density, bandwidth = smooth_reliability(torch.tensor([confidence]), torch.tensor([confidence]), GRID)
    assert bandwidth == NARROWEST
    here = int((confidence == GRID).nonzero())
    assert accuracy[here].item() == confidence
    assert accuracy.isnan().sum() == len(GRID) - 1
    assert density.argmax() == here


def test_runs_are_pooled_in_the_curve() -> None:
    runs = [top_label(*random_predictions(200, 5, 1.5, seed=s)) for s in range(3)]
    confidence, correct = (torch.stack(values) for values in zip(*runs, strict=True))
    apart = smooth_reliability(confidence, correct, GRID)
    pooled = smooth_reliability(confidence.flatten(), correct.flatten(), GRID)
    torch.testing.assert_close(apart.accuracy, pooled.accuracy, equal_nan=True)
    assert apart.bandwidth == pooled.bandwidth


def test_band_is_the_bootstrap_by_loop() -> None:
    runs = [top_label(*random_predictions(60, 5, 1.5, seed=s)) for s in range(2)]
    confidence, correct = (torch.stack(values) for values in zip(*runs, strict=True))
    low, high = smooth_reliability_band(confidence, correct, GRID, draws=50, seed=7, level=0.8)
    curve = smooth_reliability(confidence, correct, GRID)
    drawn = torch.randint(60, (50, 60), generator=torch.Generator().manual_seed(7))
    curves = []
    for images in drawn:
        c, o = confidence[:, images].flatten().numpy(), correct[:, images].flatten().double().numpy()
        weights = kernel(GRID.numpy(), c, curve.bandwidth)
        with np.errstate(invalid="ignore"):
            curves.append((GRID.numpy() + weights @ (o - c) / weights.sum(axis=1)).clip(0, 1))
    seen = ~curve.accuracy.isnan().numpy()
    dense = seen & (curve.density.numpy() > 0.5)  # elsewhere some resamples have no image near, and say nothing
    expected = np.quantile(curves, [0.1, 0.9], axis=0)
    assert dense.sum() > 10
    np.testing.assert_allclose(low[dense], expected[0][dense], atol=2e-3)
    np.testing.assert_allclose(high[dense], expected[1][dense], atol=2e-3)
    np.testing.assert_array_equal(low.isnan(), ~seen)
    np.testing.assert_array_equal(high.isnan(), ~seen)


def test_band_is_seeded_holds_the_curve_and_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence, correct = top_label(*random_predictions(400, 5, 1.5, seed=0))
    curve = smooth_reliability(confidence, correct, GRID)
    low, high = smooth_reliability_band(confidence, correct, GRID, draws=60)
    seen = ~curve.accuracy.isnan()
    assert ((low <= curve.accuracy) & (curve.accuracy <= high))[seen].double().mean() > 0.9
    narrow = smooth_reliability_band(confidence, correct, GRID, draws=60, level=0.5)
    assert (narrow[1] - narrow[0])[seen].sum() < 0.6 * (high - low)[seen].sum()
    assert not torch.equal(low[seen], smooth_reliability_band(confidence, correct, GRID, draws=60, seed=1)[0][seen])
    monkeypatch.setattr(smoothing, "BLOCK", 7 * 4 * smoothing.CELLS)  # 7 draws at a time
    for edge, again in zip((low, high), smooth_reliability_band(confidence, correct, GRID, draws=60), strict=True):
        torch.testing.assert_close(edge, again, equal_nan=True)


def test_a_second_run_of_equal_answers_does_not_narrow_the_band() -> None:
    confidence, correct = top_label(*random_predictions(100, 5, 1.5, seed=0))
    once = smooth_reliability_band(confidence, correct, GRID)
    twice = smooth_reliability_band(confidence.expand(2, -1), correct.expand(2, -1), GRID)
    common = ~once[0].isnan()
    for edge, again in zip(once, twice, strict=True):
        torch.testing.assert_close(edge[common], again[common], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confidence": torch.tensor([1.5])}, r"confidence must lie in \[0, 1\]"),
        ({"correct": torch.ones(2)}, r"one shape \(\.\.\., N\), got \(1,\) and \(2,\)"),
        ({"confidence": torch.ones(0), "correct": torch.ones(0)}, "at least one sample"),
        ({"grid": torch.tensor([0.5, 1.1])}, r"grid must lie in \[0, 1\]"),
        ({"grid": torch.ones(2, 2)}, r"grid must have shape \(G,\), G > 0, got \(2, 2\)"),
        ({"draws": 0}, r"draws must be > 0 and level in \(0, 1\), got 0 and 0.95"),
        ({"level": 1.0}, r"draws must be > 0 and level in \(0, 1\), got 200 and 1.0"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], message: str) -> None:
    arguments = {"confidence": torch.tensor([0.5]), "correct": torch.tensor([1.0]), "grid": GRID} | changes
    with pytest.raises(ValueError, match=message):
        smooth_reliability_band(**arguments)  # type: ignore[arg-type]
