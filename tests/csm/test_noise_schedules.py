import math

import pytest
import torch

from csm.noise_schedules import SPACINGS, exponential_sigmas, karras_sigmas, vp_sigmas


@pytest.mark.parametrize(("steps", "low", "high", "rho"), [(18, 0.002, 80.0, 7.0), (2, 0.1, 0.2, 1.0), (5, 0.01, 10.0, 3.0)])
def test_karras_levels_follow_the_formula(steps: int, low: float, high: float, rho: float) -> None:
    sigmas = karras_sigmas(steps, low, high, rho)
    expected = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)
    ]  # Karras et al. 2022, eq. 5
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_exponential_levels_have_one_ratio() -> None:
    sigmas = exponential_sigmas(7, 0.01, 10.0)
    assert (sigmas[1:-1] / sigmas[:-2]).tolist() == pytest.approx([10 ** (-3 / 6)] * 6)


def test_ve_levels_are_geometric_in_the_variance() -> None:
    variances = SPACINGS["ve"](9, 0.02, 100.0)[:-1].square()
    expected = [100.0**2 * (0.02**2 / 100.0**2) ** (i / 8) for i in range(9)]  # Karras et al. 2022, table 1
    assert variances.tolist() == pytest.approx(expected, rel=1e-10)


def vp_sigma(time: float) -> float:
    """Karras et al. 2022, table 1."""
    return math.sqrt(math.exp(19.9 * time**2 / 2 + 0.1 * time) - 1)


def test_vp_levels_are_those_of_even_times() -> None:
    steps = 18
    sigmas = vp_sigmas(steps, 0.002, vp_sigma(1.0))
    expected = [vp_sigma(1 + i / (steps - 1) * (1e-3 - 1)) for i in range(steps)]
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-9)


def test_vp_levels_stay_inside() -> None:
    sigmas = vp_sigmas(10, 0.3, 5.0)
    assert sigmas[[0, -2]].tolist() == pytest.approx([5.0, 0.3])
    middle = vp_sigmas(3, 0.3, 5.0)[1].item()
    times = [next(t / 1e5 for t in range(1, 100_000) if vp_sigma(t / 1e5) >= level) for level in (5.0, 0.3)]
    assert middle == pytest.approx(vp_sigma(sum(times) / 2), rel=1e-3)


def test_vp_levels_do_not_go_below_the_last_time() -> None:
    assert vp_sigmas(4, 1e-9, 1.0)[-2].item() == pytest.approx(vp_sigma(1e-3))
    with pytest.raises(ValueError, match=r"sigma_min < sigma_max, got 0\.01"):
        vp_sigmas(4, 1e-9, 0.005)


@pytest.mark.parametrize("spacing", list(SPACINGS))
@pytest.mark.parametrize("steps", [2, 3, 40])
def test_levels_fall_from_the_highest_to_the_lowest_and_then_to_0(spacing: str, steps: int) -> None:
    sigmas = SPACINGS[spacing](steps, 0.02, 80.0)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert sigmas[[0, -2]].tolist() == pytest.approx([80.0, 0.02], rel=1e-12)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_one_level_is_the_highest(spacing: str) -> None:
    assert SPACINGS[spacing](1, 0.002, 80.0).tolist() == pytest.approx([80.0, 0.0])


@pytest.mark.parametrize("spacing", list(SPACINGS))
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_levels_must_fall(spacing: str, low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"0 < sigma_min < sigma_max, got {low} and {high}"):
        SPACINGS[spacing](5, low, high)
