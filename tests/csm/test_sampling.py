import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from csm.sampling import SOLVERS, SPACINGS, SamplerConfig, evaluations, heun, karras_sigmas, noise_levels, solve

MU, SPREAD = 0.3, 0.5


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[clean | x] for clean ~ N(MU, SPREAD^2 I)."""
    s = sigma.double().view(-1, 1, 1, 1)
    return (SPREAD**2 * x.double() + s**2 * MU) / (SPREAD**2 + s**2)


def noise(rows: int = 3) -> torch.Tensor:
    return torch.randn((rows, 1, 2, 2), generator=torch.Generator().manual_seed(1))


def flow(start: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the probability flow of the Gaussian takes ``start`` from noise level ``sigma``."""
    return MU + (start.double() - MU) * SPREAD / math.hypot(SPREAD, sigma)


@pytest.mark.parametrize(("steps", "low", "high", "rho"), [(18, 0.002, 80.0, 7.0), (2, 0.1, 0.2, 1.0), (5, 0.01, 10.0, 3.0)])
def test_noise_levels_follow_the_formula(steps: int, low: float, high: float, rho: float) -> None:
    sigmas = karras_sigmas(steps, low, high, rho)
    assert sigmas.dtype == torch.float64
    expected = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)
    ]  # Karras et al. 2022, eq. 5
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert sigmas[0].item() == pytest.approx(high, rel=1e-12)
    assert sigmas[-2].item() == pytest.approx(low, rel=1e-12)
    assert (sigmas.diff() < 0).all()


def test_one_level_is_the_highest() -> None:
    assert karras_sigmas(1, 0.002, 80.0).tolist() == pytest.approx([80.0, 0.0])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_levels_must_fall(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"0 < sigma_min < sigma_max, got {low} and {high}"):
        karras_sigmas(5, low, high)


def test_the_flow_of_a_gaussian_is_followed() -> None:
    images = heun(gaussian, noise(), karras_sigmas(200))
    assert images.dtype == torch.float32
    expected = flow(noise() * 80.0, 80.0)
    assert torch.allclose(images.double(), expected, atol=5e-4)
    assert expected.std() > 0.1  # the rows do differ


def test_the_error_falls_with_the_square_of_the_steps() -> None:
    def error(steps: int) -> float:
        images = heun(gaussian, noise(), karras_sigmas(steps, sigma_min=0.002, sigma_max=20.0))
        return (images.double() - flow(noise() * 20.0, 20.0)).abs().max().item()

    errors = [error(steps) for steps in (16, 32, 64)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([2.0, 2.0], abs=0.25)


def test_one_step_is_the_denoised_noise() -> None:
    images = heun(gaussian, noise(), karras_sigmas(1, sigma_max=5.0))
    assert torch.allclose(images.double(), gaussian(noise() * 5.0, torch.tensor([5.0])), atol=1e-6)


def test_two_steps_by_hand() -> None:
    sigmas = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    start = float(noise(1)[0, 0, 0, 0]) * 2.0

    def denoised(x: float, sigma: float) -> float:
        return (SPREAD**2 * x + sigma**2 * MU) / (SPREAD**2 + sigma**2)

    slope = (start - denoised(start, 2.0)) / 2.0
    euler = start - slope
    corrected = start - (slope + (euler - denoised(euler, 1.0)) / 1.0) / 2
    assert heun(gaussian, noise(1), sigmas)[0, 0, 0, 0].item() == pytest.approx(denoised(corrected, 1.0), abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_network_is_called_twice_a_step_but_once_in_the_last(steps: int) -> None:
    seen: list[float] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert (x.dtype, sigma.dtype, sigma.shape) == (torch.float32, torch.float32, (3,))
        seen.append(sigma[0].item())
        return gaussian(x, sigma).float()

    sigmas = karras_sigmas(steps)
    heun(counting, noise(), sigmas)
    assert len(seen) == 2 * steps - 1
    expected = [sigmas[0].item()] + [level.item() for level in sigmas[1:-1] for _ in range(2)]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    assert not heun(lambda x, sigma: x * weight * 0.5, noise(), karras_sigmas(3)).requires_grad


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"sigma_min": 0}, {"sigma_max": -1}, {"rho": 0}, {"solver": "rk4"}, {"spacing": "even"}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        SamplerConfig(**settings)


# At these numbers of steps the errors are well above float32's rounding. More than the order is luck of opposite signs, and allowed.
@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0), ("dpmpp-2m", 2.0), ("multistep-3", 3.0)])
@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_every_solver_shows_its_order_on_the_flow_of_a_gaussian(solver: str, order: float, spacing: str) -> None:
    low, high = 0.05, 10.0

    def error(steps: int) -> float:
        sigmas = SPACINGS[spacing](steps, low, high)[:-1]  # to sigma_min, where the exact flow is known too
        images = SOLVERS[solver](gaussian, noise(), sigmas)
        exact = MU + (noise().double() * high - MU) * math.hypot(SPREAD, low) / math.hypot(SPREAD, high)
        return (images.double() - exact).abs().max().item()

    errors = [error(steps) for steps in (24, 48)]
    assert math.log2(errors[0] / errors[1]) > order - 0.25
    assert errors[1] < 0.05


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_evaluations_are_counted_as_they_are_made(solver: Any, steps: int) -> None:
    calls: list[int] = []

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return gaussian(x, sigma)

    config = SamplerConfig(solver=solver, steps=steps)
    images = solve(counting, noise(), config)
    assert len(calls) == evaluations(config)
    assert images.dtype == torch.float32
    assert images.shape == noise().shape


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_ends_where_the_flow_ends(solver: Any) -> None:
    images = solve(gaussian, noise(), SamplerConfig(solver=solver, steps=400, sigma_max=20.0))
    assert torch.allclose(images.double(), flow(noise() * 20.0, 20.0), atol=0.03 if solver == "euler" else 1e-3)


def test_a_solver_is_exact_where_the_denoiser_is_constant() -> None:
    for solver in SOLVERS.values():
        images = solver(lambda x, sigma: torch.full_like(x, 0.25), noise(), karras_sigmas(5))
        assert torch.allclose(images, torch.full_like(images, 0.25), atol=1e-6)


def test_two_steps_of_dpmpp_2m_by_hand() -> None:
    sigmas = torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64)
    x = noise(1).double() * 4.0
    first = gaussian(x, torch.tensor([4.0]))
    x = 0.5 * x + 0.5 * first
    second = gaussian(x, torch.tensor([2.0]))
    ratio = math.log(4.0 / 2.0) / math.log(2.0 / 0.5)  # r of Alg. 2
    mixed = (1 + 1 / (2 * ratio)) * second - first / (2 * ratio)
    x = 0.25 * x + 0.75 * mixed
    assert torch.allclose(SOLVERS["dpmpp-2m"](gaussian, noise(1), sigmas).double(), x, atol=1e-6)


def test_exponential_levels_have_one_ratio() -> None:
    sigmas = noise_levels(SamplerConfig(spacing="exponential", steps=7, sigma_min=0.01, sigma_max=10.0))
    ratios = (sigmas[1:-1] / sigmas[:-2]).tolist()
    assert ratios == pytest.approx([10 ** (-3 / 6)] * 6)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_every_spacing_refuses_levels_that_do_not_fall(spacing: str) -> None:
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max, got 2 and 1"):
        SPACINGS[spacing](5, 2, 1)
