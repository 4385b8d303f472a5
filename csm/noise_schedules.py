"""Spacings of the noise levels at which a solver evaluates the denoiser."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise levels float64 (steps + 1,), falling from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5)."""
    _check(sigma_min, sigma_max)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _ending_at_0((high + _ramp(steps) * (low - high)) ** rho)


def exponential_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> torch.Tensor:
    """Noise levels float64 (steps + 1,), evenly spaced in ln(sigma) from sigma_max to sigma_min, then 0.

    Those of the VE process too, whose sigma^2 is geometric (Karras et al. 2022, table 1).
    """
    _check(sigma_min, sigma_max)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64)
    return _ending_at_0(levels.exp())


def vp_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> torch.Tensor:
    """Noise levels float64 (steps + 1,) at evenly spaced times of the VP process, then 0 (Karras et al. 2022, table 1).

    sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1) with beta_d = 19.9 and beta_min = 0.1. Time falls from that of sigma_max to
    that of sigma_min, but not below eps_s = 0.001, where sigma is 0.0105.
    """
    _check(sigma_min, sigma_max)
    lowest = max(sigma_min, math.sqrt(math.expm1(_vp_exponent(_VP_LAST))))
    _check(lowest, sigma_max)
    first, last = _vp_time(sigma_max), _vp_time(lowest)
    return _ending_at_0(_vp_exponent(first + _ramp(steps) * (last - first)).expm1().sqrt())


_VP_SLOPE, _VP_START, _VP_LAST = 19.9, 0.1, 1e-3  # beta_d, beta_min, eps_s
T = TypeVar("T", float, torch.Tensor)


def _vp_exponent(time: T) -> T:
    """ln(sigma^2 + 1)."""
    return time * (time * _VP_SLOPE / 2 + _VP_START)


def _vp_time(sigma: float) -> float:
    """The time t >= 0 at which the VP process has noise level ``sigma``."""
    return (math.sqrt(_VP_START**2 + 2 * _VP_SLOPE * math.log1p(sigma**2)) - _VP_START) / _VP_SLOPE


def _check(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


def _ramp(steps: int) -> torch.Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def _ending_at_0(levels: torch.Tensor) -> torch.Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


SPACINGS: dict[str, Callable[..., torch.Tensor]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "vp": vp_sigmas,
    "ve": exponential_sigmas,
}
