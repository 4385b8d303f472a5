"""The four preconditionings of Karras et al. 2022, table 1: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

Each is made from settings that have the checkpoints' names, and gives ``Coefficients`` of noise levels float32 (N,). The formulas are
evaluated in float32 as they were when the networks were trained.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import nn


class Coefficients(NamedTuple):
    """Each float32 (N,)."""

    skip: torch.Tensor
    out: torch.Tensor
    in_: torch.Tensor
    noise: torch.Tensor


class VP(nn.Module):
    """Variance preserving, continuous in time (Song et al. 2021)."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000) -> None:
        super().__init__()
        self.beta_d, self.beta_min, self.steps = beta_d, beta_min, M

    def forward(self, sigma: torch.Tensor) -> Coefficients:
        """c_noise is the time of ``sigma`` in [0, 1], times M - 1."""
        time = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), (self.steps - 1) * time)


class VE(nn.Module):
    """Variance exploding (Song et al. 2021)."""

    def forward(self, sigma: torch.Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log())


class IDDPM(nn.Module):
    """Improved DDPM (Nichol & Dhariwal 2021): the network knows M noise levels ``u``, highest first; c_noise is the nearest one's step."""

    u: torch.Tensor

    def __init__(self, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> None:
        super().__init__()
        if not 1 <= M <= 100_000:
            raise ValueError(f"M must be from 1 to 100000, got {M}")
        abar = [math.sin(math.pi / 2 * step / (M * (C_2 + 1))) ** 2 for step in range(M + 1)]
        levels = [0.0]
        for step in range(M, 0, -1):
            levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(abar[step - 1] / abar[step], C_1) - 1))
        self.register_buffer("u", torch.tensor(levels[::-1], dtype=torch.float32))  # (M + 1,), the last of them 0

    def forward(self, sigma: torch.Tensor) -> Coefficients:
        nearest = (sigma[:, None] - self.u).abs().argmin(dim=1)
        noise = len(self.u) - 2 - nearest.to(sigma.dtype)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), noise)


class EDM(nn.Module):
    """Karras et al. 2022: what goes in and what is asked for have variance 1."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def forward(self, sigma: torch.Tensor) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        out = sigma * self.sigma_data / variance.sqrt()
        return Coefficients(self.sigma_data**2 / variance, out, 1 / variance.sqrt(), sigma.log() / 4)


Preconditioning = Literal["VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"]
PRECONDITIONINGS: dict[str, type[nn.Module]] = {"VPPrecond": VP, "VEPrecond": VE, "iDDPMPrecond": IDDPM, "EDMPrecond": EDM}
