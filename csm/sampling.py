"""Noise levels and solvers of the probability-flow ODE. They know only ``denoise(x, sigma)``."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SamplerConfig:
    """How the ODE is solved.

    Attributes:
        solver: see ``SOLVERS``. "heun" costs 2 * steps - 1 network evaluations (paper: 20 steps), every other one ``steps``.
        spacing: of the noise levels, see ``SPACINGS``.
        steps: number of noise levels above 0.
        sigma_min, sigma_max: lowest and highest of them.
        rho: of the "karras" spacing.
    """

    solver: Literal["heun", "euler", "dpmpp-2m", "multistep-3"] = "heun"
    spacing: Literal["karras", "exponential"] = "karras"
    steps: int = Field(default=20, ge=1)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, gt=0)


def noise_levels(config: SamplerConfig) -> torch.Tensor:
    """Noise levels float64 (steps + 1,) of ``config``, falling from sigma_max to sigma_min, then 0."""
    if config.spacing == "karras":
        return karras_sigmas(config.steps, config.sigma_min, config.sigma_max, config.rho)
    return SPACINGS[config.spacing](config.steps, config.sigma_min, config.sigma_max)


def solve(denoise: Denoiser, noise: torch.Tensor, config: SamplerConfig) -> torch.Tensor:
    """Images float32 (N, C, H, W) from standard normal noise (N, C, H, W), by the solver of ``config``."""
    return SOLVERS[config.solver](denoise, noise, noise_levels(config).to(noise.device))


def evaluations(config: SamplerConfig) -> int:
    """Network evaluations for one image."""
    return 2 * config.steps - 1 if config.solver == "heun" else config.steps


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise levels float64 (steps + 1,), falling from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5)."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def exponential_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> torch.Tensor:
    """Noise levels float64 (steps + 1,), evenly spaced in ln(sigma) from sigma_max to sigma_min, then 0."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    levels = torch.linspace(np.log(sigma_max), np.log(sigma_min), steps, dtype=torch.float64).exp()
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def euler(denoise: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Euler's method in sigma, which is DDIM (Song et al. 2021; Karras et al. 2022, app. B). Arguments and result as for ``heun``."""
    x = noise.double() * sigmas[0]
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * (x - _denoised(denoise, x, sigma)) / sigma
    return x.float()


Weights = Callable[[Sequence[float], float], Sequence[float]]


@torch.no_grad()
def multistep(denoise: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, order: int, weights: Weights) -> torch.Tensor:
    """Exponential multistep methods: one evaluation a step. Arguments and result as for ``heun``.

    With lambda = -ln(sigma), x_t = (sigma_t / sigma_s) x_s + integral of e^(lambda - lambda_t) D(lambda) from lambda_s to lambda_t
    is exact (Lu et al. 2022, DPM-Solver++, prop. 4.1 with alpha = 1); the integral becomes a weighted sum of the last ``order`` values
    of D. The first steps, which have fewer of them, are of lower order: harmless at high noise, where D barely changes. The last
    one, to 0, is the limit of the first-order step.

    Args:
        weights: (lambdas of the known values, the newest first; lambda_t) -> their weights.
    """
    x = noise.double() * sigmas[0]
    known: deque[tuple[float, torch.Tensor]] = deque(maxlen=order)  # (lambda, D), the newest first
    for sigma, following in pairwise(sigmas):
        known.appendleft((-float(sigma.log()), _denoised(denoise, x, sigma)))
        if following == 0:
            return known[0][1].float()
        x = following / sigma * x
        for weight, (_, value) in zip(weights([time for time, _ in known], -float(following.log())), known, strict=True):
            x = x + weight * value
    return x.float()


def _dpmpp_2m(times: Sequence[float], end: float) -> list[float]:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2)."""
    step = end - times[0]
    whole = -float(np.expm1(-step))
    if len(times) == 1:
        return [whole]
    share = step / (times[0] - times[1]) / 2
    return [whole * (1 + share), -whole * share]


def _exact(times: Sequence[float], end: float) -> list[float]:
    """The exact integral over the polynomial through the known values (exponential Adams-Bashforth; cf. DEIS, Zhang & Chen 2023).

    Gauss-Legendre quadrature is exact to rounding here; the closed form loses digits on short steps.
    """
    half = (end - times[0]) / 2
    points = times[0] + half * (_NODES + 1)
    weights = []
    for time in times:
        basis = np.prod([(points - other) / (time - other) for other in times if other != time], axis=0) * np.ones_like(points)
        weights.append(float(half * np.sum(_NODE_WEIGHTS * np.exp(points - end) * basis)))
    return weights


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


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


SPACINGS: dict[str, Callable[..., torch.Tensor]] = {"karras": karras_sigmas, "exponential": exponential_sigmas}
SOLVERS: dict[str, Callable[[Denoiser, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "heun": heun,
    "euler": euler,
    "dpmpp-2m": partial(multistep, order=2, weights=_dpmpp_2m),
    "multistep-3": partial(multistep, order=3, weights=_exact),
}
