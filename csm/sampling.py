"""Solvers of the probability-flow ODE, and of an SDE with the same marginals. They know only ``denoise(x, sigma)``."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.noise_schedules import SPACINGS, karras_sigmas
from csm.parameters import STRICT

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FreshNoise = Callable[[int], torch.Tensor]  # step, counted from 0 -> standard normal (N, C, H, W)
Renoise = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, config=STRICT)
class SamplerConfig:
    """How the ODE is solved.

    The defaults were chosen by ``csm bench solvers``: this solver and these noise levels come as close to the exact solution as the
    paper's 39 evaluations (Heun, 20 steps, "karras" from 80 to 0.002) with the fewest: 11 on a UNet of ``digits-hard``, 10 on Gaussians
    of ``digits``, and 13 on a UNet of ``digits``, measured in the same way.

    Attributes:
        solver: see ``SOLVERS``. "heun" costs 2 * steps - 1 network evaluations (paper: 20 steps), every other one ``steps``.
        spacing: of the noise levels, see ``SPACINGS``.
        steps: number of noise levels above 0.
        sigma_min, sigma_max: lowest and highest of them.
        rho: of the "karras" spacing.
        churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax and S_noise of EDM's stochastic sampler (Karras et al. 2022,
            Alg. 2), for "heun" only. Churn 0 adds no noise.
    """

    solver: Literal["heun", "euler", "dpmpp-2m", "multistep-3", "abm-3"] = "abm-3"
    spacing: Literal["karras", "exponential", "vp", "ve"] = "exponential"
    steps: int = Field(default=13, ge=1)
    sigma_min: float = Field(default=0.02, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, gt=0)
    churn: float = Field(default=0.0, ge=0)
    churn_min: float = Field(default=0.0, ge=0)
    churn_max: float = Field(default=80.0, gt=0)
    churn_noise: float = Field(default=1.0, gt=0)


def noise_levels(config: SamplerConfig) -> torch.Tensor:
    """Noise levels float64 (steps + 1,) of ``config``, falling from sigma_max to sigma_min, then 0."""
    if config.spacing == "karras":
        return karras_sigmas(config.steps, config.sigma_min, config.sigma_max, config.rho)
    return SPACINGS[config.spacing](config.steps, config.sigma_min, config.sigma_max)


def solve(denoise: Denoiser, noise: torch.Tensor, config: SamplerConfig, fresh: FreshNoise | None = None) -> torch.Tensor:
    """Images float32 (N, C, H, W) from standard normal noise (N, C, H, W), by the solver of ``config``.

    Args:
        denoise, noise: as for ``heun``.
        config: see there.
        fresh: needed if ``config.churn`` is above 0: step -> more noise like ``noise``, on its device.
    """
    sigmas = noise_levels(config)  # on the CPU: a solver that asks a GPU for a level would wait for all that it was given before
    if config.churn == 0:
        return SOLVERS[config.solver](denoise, noise, sigmas)
    if config.solver != "heun" or fresh is None:
        raise ValueError(f"churn {config.churn:g} needs solver 'heun' and fresh noise, got {config.solver!r} and fresh={fresh}")
    return heun(denoise, noise, sigmas, partial(churned, config=config, fresh=fresh))


def within(config: SamplerConfig, sigma_range: tuple[float, float]) -> SamplerConfig:
    """``config`` with its noise levels kept inside ``sigma_range``, those that a generator was trained on."""
    low, high = sigma_range
    return replace(config, sigma_min=max(low, config.sigma_min), sigma_max=min(high, config.sigma_max))


def evaluations(config: SamplerConfig) -> int:
    """Network evaluations for one image."""
    return 2 * config.steps - 1 if config.solver == "heun" else config.steps


@torch.no_grad()
def euler(denoise: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Euler's method in sigma, which is DDIM (Song et al. 2021; Karras et al. 2022, app. B). Arguments and result as for ``heun``."""
    x = noise.double() * sigmas[0]
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * (x - _denoised(denoise, x, sigma)) / sigma
    return x.float()


Known = deque[tuple[float, torch.Tensor]]  # lambda and D there, the newest first
Weights = Callable[[Sequence[float], float, float], Sequence[float]]  # (lambdas of the known values, lambda_s, lambda_t)


@torch.no_grad()
def multistep(
    denoise: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, order: int, weights: Weights, correct: bool = False
) -> torch.Tensor:
    """Exponential multistep methods: one evaluation a step. Arguments and result as for ``heun``.

    With lambda = -ln(sigma), x_t = (sigma_t / sigma_s) x_s + integral of e^(lambda - lambda_t) D(lambda) from lambda_s to lambda_t
    is exact (Lu et al. 2022, DPM-Solver++, prop. 4.1 with alpha = 1); the integral becomes a weighted sum of the last ``order`` values
    of D. The first steps, which have fewer of them, are of lower order: harmless at high noise, where D barely changes. The last
    one, to 0, is the limit of the first-order step.

    Args:
        weights: of the known values.
        correct: once D is known at the end of a step, do the step again with this value among the ``order`` last; D is not evaluated
            again (Adams-Moulton after Adams-Bashforth; UniPC, Zhao et al. 2023, Alg. 1).
    """
    x = noise.double() * sigmas[0]
    known: Known = deque(maxlen=order)
    start = (x, sigmas[0])  # of the last step
    for sigma, following in pairwise(sigmas):
        known.appendleft((_lambda(sigma), _denoised(denoise, x, sigma)))
        if following == 0:
            return known[0][1].float()
        if correct and len(known) > 1:
            x = _advanced(*start, sigma, known, weights)
        start = (x, sigma)
        x = _advanced(*start, following, known, weights)
    return x.float()


def _advanced(x: torch.Tensor, sigma: torch.Tensor, following: torch.Tensor, known: Known, weights: Weights) -> torch.Tensor:
    """``x`` float64 (N, C, H, W) at noise level ``sigma``, taken to ``following``."""
    x = following / sigma * x
    shares = weights([time for time, _ in known], _lambda(sigma), _lambda(following))
    for share, (_, value) in zip(shares, known, strict=True):
        x = x + share * value
    return x


def _lambda(sigma: torch.Tensor) -> float:
    return -float(sigma.log())


def _dpmpp_2m(times: Sequence[float], start: float, end: float) -> list[float]:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2); ``start`` is the time of the newest value."""
    step = end - start
    whole = -float(np.expm1(-step))
    if len(times) == 1:
        return [whole]
    share = step / (start - times[1]) / 2
    return [whole * (1 + share), -whole * share]


def _exact(times: Sequence[float], start: float, end: float) -> list[float]:
    """The exact integral over the polynomial through the known values (exponential Adams methods; cf. DEIS, Zhang & Chen 2023).

    Gauss-Legendre quadrature is exact to rounding here; the closed form loses digits on short steps.
    """
    half = (end - start) / 2
    points = start + half * (_NODES + 1)
    weights = []
    for time in times:
        basis = np.prod([(points - other) / (time - other) for other in times if other != time], axis=0) * np.ones_like(points)
        weights.append(float(half * np.sum(_NODE_WEIGHTS * np.exp(points - end) * basis)))
    return weights


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


@torch.no_grad()
def heun(denoise: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, renoise: Renoise | None = None) -> torch.Tensor:
    """Integrate dx/dsigma = (x - D(x, sigma)) / sigma from sigmas[0] to 0 (Karras et al. 2022, Alg. 2).

    Args:
        denoise: (x float32 (N, C, H, W), sigma float32 (N,)) -> estimate of the clean image (N, C, H, W).
        noise: standard normal (N, C, H, W); it is scaled by sigmas[0].
        sigmas: float64 (S + 1,), falling, the last one 0.
        renoise: (x float64 (N, C, H, W), its noise level, step) -> both after more noise; none: S_churn = 0.

    Returns:
        images float32 (N, C, H, W). The state is kept in float64, as the paper does.
    """
    x = noise.double() * sigmas[0]
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        if renoise:
            x, sigma = renoise(x, sigma, step)
        slope = (x - _denoised(denoise, x, sigma)) / sigma
        length = following - sigma
        euler = x + length * slope
        if following > 0:
            corrected = (euler - _denoised(denoise, euler, following)) / following
            x = x + length * (slope + corrected) / 2
        else:
            x = euler
    return x.float()


def churned(
    x: torch.Tensor, sigma: torch.Tensor, step: int, config: SamplerConfig, fresh: FreshNoise
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` float64 (N, C, H, W) raised from noise level sigma float64 () to sigma (1 + gamma) (Karras et al. 2022, Alg. 2).

    gamma = min(churn / steps, sqrt(2) - 1) for levels in [churn_min, churn_max], else 0. One thing differs: no level is raised above
    ``config.sigma_max``, beyond which a generator may not have been trained.
    """
    gamma = min(config.churn / config.steps, math.sqrt(2) - 1)
    if not config.churn_min <= sigma <= config.churn_max:
        return x, sigma
    raised = (sigma * (1 + gamma)).clamp(max=config.sigma_max)
    added = config.churn_noise * (raised**2 - sigma**2).clamp(min=0).sqrt()
    return x + added * fresh(step).double(), raised


def _denoised(denoise: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Evaluate the network in float32 and return float64."""
    return denoise(x.float(), torch.full((len(x),), sigma.item(), dtype=torch.float32, device=x.device)).double()


SOLVERS: dict[str, Callable[[Denoiser, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "heun": heun,
    "euler": euler,
    "dpmpp-2m": partial(multistep, order=2, weights=_dpmpp_2m),
    "multistep-3": partial(multistep, order=3, weights=_exact),
    "abm-3": partial(multistep, order=3, weights=_exact, correct=True),
}
