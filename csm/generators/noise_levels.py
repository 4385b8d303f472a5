"""Discrete variance-preserving (VP) schedules of trained models, as noise levels sigma of x = clean + sigma * noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from csm.errors import InputError
from csm.model_folders import read_config
from csm.parameters import expected

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Beta = Annotated[float, Field(gt=0, lt=1)]

# diffusers' solvers of one and the same VP process. Not among them: flow matching, EDM, and those of distilled models (LCM, TCD), whose
# networks are no denoisers.
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True)
class VPConfig:
    """What of a ``scheduler_config.json`` says how the network was trained; the rest is about diffusers' own solvers.

    The betas have no defaults: diffusers' differ from scheduler to scheduler, and every file that it writes holds them.
    """

    num_train_timesteps: Annotated[int, Field(ge=2)]
    beta_start: Beta
    beta_end: Beta
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    rescale_betas_zero_snr: Literal[False] = False  # its last noise level is infinite
    use_flow_sigmas: Literal[False] = False
    timestep_type: Literal["discrete"] = "discrete"


class VPSchedule(nn.Module):
    """A network that predicts epsilon, v or the sample at steps 0..T-1, as D(x; sigma).

    sigma_t = sqrt((1 - abar_t) / abar_t) with abar_t the product of 1 - beta (Karras et al. 2022, app. C.3 and table 1, VP). A module,
    because its table of ln(sigma), float64 (T,), goes where the network goes.
    """

    log_sigmas: torch.Tensor

    def __init__(self, betas: torch.Tensor, prediction: str) -> None:
        """``betas`` float64 (T,), in (0, 1), T > 1; ``prediction`` as diffusers' ``prediction_type``."""
        super().__init__()
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas must be two or more numbers between 0 and 1, got {betas}")
        abar = (1 - betas.double()).cumprod(0)
        self.register_buffer("log_sigmas", ((1 - abar) / abar).log() / 2)
        self.prediction = prediction

    @property
    def sigma_range(self) -> tuple[float, float]:
        """sigma of the first and of the last step."""
        return math.exp(self.log_sigmas[0].item()), math.exp(self.log_sigmas[-1].item())

    def timesteps(self, sigma: torch.Tensor) -> torch.Tensor:
        """Steps float32 (N,) in [0, T-1], fractional, of sigma (N,): linear in ln(sigma) between two steps (k-diffusion, external.py).

        Levels outside ``sigma_range`` get the first or the last step.
        """
        table = self.log_sigmas
        level = sigma.to(table).log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, level).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (level - low) / (high - low)).float()

    def denoise(self, network: Network, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """D(x; sigma) float32 (N, C, H, W), from x = clean + sigma * noise float32 (N, C, H, W) and sigma float32 (N,).

        ``network(z, t)`` takes z = c_in x with c_in = 1 / sqrt(sigma^2 + 1), (N, C, H, W), and steps float32 (N,). With
        z = alpha clean + s noise, alpha = c_in and s = sigma c_in:

        - epsilon: D = x - sigma epsilon (Karras et al. 2022, table 1: c_skip = 1, c_out = -sigma);
        - v = alpha noise - s clean: D = alpha z - s v (Salimans & Ho 2022, app. D);
        - sample: D is the prediction.
        """
        level = sigma.view(-1, 1, 1, 1)
        alpha = 1 / (level**2 + 1).sqrt()
        z = alpha * x
        output = network(z, self.timesteps(sigma))
        if self.prediction == "epsilon":
            return x - level * output
        if self.prediction == "v_prediction":
            return alpha * z - level * alpha * output
        return output


def read_schedule(path: Path) -> VPSchedule:
    """The schedule in diffusers' ``scheduler_config.json`` at ``path``; ``InputError`` names what is missing or not VP."""
    value = read_config(path, SCHEDULERS)
    if value.get("predict_epsilon") is False:  # what files of diffusers before 0.4 say
        value.setdefault("prediction_type", "sample")
    try:
        config = TypeAdapter(VPConfig).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {expected(first)}; only VP schedules of finite noise can be used") from None
    try:
        return VPSchedule(vp_betas(config), config.prediction_type)
    except ValueError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None


def vp_betas(config: VPConfig) -> torch.Tensor:
    """betas float64 (T,), as diffusers' schedulers make them.

    linear: Ho et al. 2020, section 4; scaled_linear (in the square root): Rombach et al. 2022; squaredcos_cap_v2: abar_t =
    cos^2((t / T + 0.008) / 1.008 * pi / 2) with betas capped at 0.999 (Nichol & Dhariwal 2021, eq. 17).
    """
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float64)
    if config.beta_schedule == "linear":
        return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float64) ** 2
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
