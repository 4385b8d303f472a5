"""Noise levels and solvers of the probability-flow ODE. They know only ``denoise(x, sigma)``."""

from collections.abc import Callable
from itertools import pairwise

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SamplerConfig:
    """Heun's method on Karras' noise levels; ``steps`` levels cost 2 * steps - 1 network evaluations (paper: 20 steps)."""

    steps: int = Field(default=20, ge=1)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, gt=0)


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise levels float64 (steps + 1,), falling from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5)."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun(denoise: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Integrate dx/dsigma = (x - D(x, sigma)) / sigma from sigmas[0] to 0 (Karras et al. 2022, Alg. 2 with S_churn = 0).

    Args:
        denoise: (x float32 (N, C, H, W), sigma float32 (N,)) -> estimate of the clean image (N, C, H, W).
        noise: standard normal (N, C, H, W); it is scaled by sigmas[0].
        sigmas: float64 (S + 1,), falling, the last one 0.

    Returns:
        images float32 (N, C, H, W). The state is kept in float64, as the paper does.
    """
    x = noise.double() * sigmas[0]
    for sigma, following in pairwise(sigmas):
        slope = (x - _denoised(denoise, x, sigma)) / sigma
        step = following - sigma
        euler = x + step * slope
        if following > 0:
            corrected = (euler - _denoised(denoise, euler, following)) / following
            x = x + step * (slope + corrected) / 2
        else:
            x = euler
    return x.float()


def _denoised(denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Evaluate the network in float32 and return float64."""
    return denoise(x.float(), sigma.float().expand(len(x)).to(x.device)).double()
