import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.integrate import quad

from csm.noise_schedules import SPACINGS, karras_sigmas
from csm.sampling import SOLVERS, SamplerConfig, evaluations, heun, noise_levels, solve

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
    "settings",
    [
        {"steps": 0},
        {"sigma_min": 0},
        {"sigma_max": -1},
        {"rho": 0},
        {"solver": "rk4"},
        {"spacing": "even"},
        {"churn": -1},
        {"churn_noise": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        SamplerConfig(**settings)


# At these numbers of steps the errors are well above float32's rounding. More than the order is luck of opposite signs, and allowed.
@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1.0), ("heun", 2.0), ("dpmpp-2m", 2.0), ("multistep-3", 3.0), ("abm-3", 3.0)]
)
@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_every_solver_shows_its_order_on_the_flow_of_a_gaussian(solver: str, order: float, spacing: str) -> None:
    low, high = 0.05, 10.0

    def error(steps: int) -> float:
        sigmas = SPACINGS[spacing](steps, low, high)[:-1]  # to sigma_min, where the exact flow is known too
        images = SOLVERS[solver](gaussian, noise(), sigmas)
        exact = MU + (noise().double() * high - MU) * math.hypot(SPREAD, low) / math.hypot(SPREAD, high)
        return (images.double() - exact).abs().max().item()

    # VP's last steps are long in ln(sigma), which is where the multistep methods take theirs.
    errors = [error(steps) for steps in ((128, 256) if spacing == "vp" else (24, 48))]
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
    images = solve(gaussian, noise(), SamplerConfig(solver=solver, spacing="karras", steps=400, sigma_min=0.002, sigma_max=20.0))
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


def test_two_steps_of_abm_by_hand() -> None:
    start, times = noise(1).double()[0, 0, 0, 0].item() * 4.0, [-math.log(level) for level in (4.0, 2.0, 0.5)]

    def denoised(x: float, time: float) -> float:
        return float(gaussian(torch.tensor([x]).view(1, 1, 1, 1), torch.tensor([math.exp(-time)])))

    def line(first: float, second: float, end: float, begin: float) -> float:
        """The integral of e^(time - end) times the line through ``first`` at times[0] and ``second`` at times[1]."""
        slope = (second - first) / (times[1] - times[0])
        value, _ = quad(lambda time: math.exp(time - end) * (first + slope * (time - times[0])), begin, end)
        return value

    first = denoised(start, times[0])
    predicted = 0.5 * start + 0.5 * first
    second = denoised(predicted, times[1])
    corrected = 0.5 * start + line(first, second, times[1], times[0])
    expected = 0.25 * corrected + line(first, second, times[2], times[1])
    found = SOLVERS["abm-3"](gaussian, noise(1), torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64))
    assert found[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert abs(corrected - predicted) > 1e-3  # far more than the tolerance


@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_the_levels_are_those_of_the_spacing(spacing: Any) -> None:
    config = SamplerConfig(spacing=spacing, steps=7, sigma_min=0.03, sigma_max=9.0, rho=5.0)
    extra = {"rho": 5.0} if spacing == "karras" else {}
    assert torch.equal(noise_levels(config), SPACINGS[spacing](7, 0.03, 9.0, **extra))


CHURNED = SamplerConfig(
    solver="heun",
    spacing="karras",
    steps=6,
    sigma_min=0.05,
    sigma_max=20.0,
    churn=1.5,
    churn_min=0.1,
    churn_max=15.0,
    churn_noise=1.1,
)


def fresh(step: int) -> torch.Tensor:
    return torch.randn((3, 1, 2, 2), generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize("churn", [1.5, 1000.0], ids=["a-quarter", "at-most-sqrt-2"])
def test_churn_follows_algorithm_2(churn: float) -> None:
    config = replace(CHURNED, churn=churn)
    levels = [*noise_levels(config).tolist()]
    x = noise().double() * levels[0]
    raised = 0
    for step, (t, following) in enumerate(pairwise(levels)):  # Karras et al. 2022, Alg. 2, line by line
        gamma = min(churn / 6, math.sqrt(2) - 1) if 0.1 <= t <= 15.0 else 0.0
        raised += gamma > 0
        hat = t + gamma * t
        x = x + math.sqrt(hat**2 - t**2) * 1.1 * fresh(step).double()
        slope = (x - gaussian(x, torch.tensor([hat]))) / hat
        end = x + (following - hat) * slope
        if following != 0:
            other = (end - gaussian(end, torch.tensor([following]))) / following
            end = x + (following - hat) * (slope + other) / 2
        x = end
    assert raised == 4  # not the first, above churn_max, and not the last, below churn_min
    assert torch.allclose(solve(gaussian, noise(), config, fresh).double(), x, atol=1e-5)


def test_churn_raises_no_level_above_the_highest() -> None:
    seen: list[float] = []

    def watching(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma[0].item())
        return gaussian(x, sigma)

    solve(watching, noise(), replace(CHURNED, churn_max=80.0, churn=1000.0), fresh)
    assert max(seen) == 20.0


def test_churned_images_have_the_distribution_of_the_data() -> None:
    rows = 4000
    start = torch.randn((rows, 1, 2, 2), generator=torch.Generator().manual_seed(1))
    drawn = torch.Generator().manual_seed(2)
    config = SamplerConfig(solver="heun", spacing="karras", steps=60, sigma_min=0.002, sigma_max=20.0, churn=15.0)
    images = solve(gaussian, start, config, lambda step: torch.randn(start.shape, generator=drawn)).double()
    count = images.numel()
    assert images.mean().item() == pytest.approx(MU, abs=4.5 * SPREAD / math.sqrt(count))
    assert images.std().item() == pytest.approx(SPREAD, abs=4.5 * SPREAD / math.sqrt(2 * count) + 0.002)  # and Heun's error
    # Much of the first noise is forgotten, which the flow keeps whole.
    assert torch.corrcoef(torch.stack([images.flatten(), start.flatten().double()]))[0, 1] < 0.5


def test_no_churn_needs_and_takes_no_noise() -> None:
    def never(step: int) -> torch.Tensor:
        raise AssertionError(step)

    config = replace(CHURNED, churn=0.0)
    assert torch.equal(solve(gaussian, noise(), config, never), heun(gaussian, noise(), noise_levels(config)))


def test_churn_without_noise_or_with_another_solver_is_refused() -> None:
    with pytest.raises(ValueError, match=r"churn 1\.5 needs solver 'heun' and fresh noise, got 'heun' and fresh=None"):
        solve(gaussian, noise(), CHURNED)
    with pytest.raises(ValueError, match=r"churn 1\.5 needs solver 'heun' and fresh noise, got 'euler'"):
        solve(gaussian, noise(), replace(CHURNED, solver="euler"), fresh)
