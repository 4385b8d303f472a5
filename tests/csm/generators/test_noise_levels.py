import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from csm.errors import InputError
from csm.generators.noise_levels import VPSchedule, read_schedule

SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
    "trained": {"trained_betas": [0.1, 0.2, 0.05, 0.4]},
}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def saved(folder: Path, **settings: Any) -> Path:
    DDIMScheduler(clip_sample=False, **settings).save_pretrained(folder)
    return folder / "scheduler_config.json"


def linear(prediction: str = "epsilon") -> VPSchedule:
    return VPSchedule(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), prediction)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_levels_are_those_of_diffusers(tmp_path: Path, name: str) -> None:
    sigmas = read_schedule(saved(tmp_path, **SCHEDULES[name])).log_sigmas.exp()
    betas = DDIMScheduler(**SCHEDULES[name]).betas.double()  # its products of float32 lose digits of 1 - abar
    alphas = (1 - betas).cumprod(0)
    assert torch.allclose(sigmas, ((1 - alphas) / alphas).sqrt(), rtol=5e-4)


def test_old_files_that_do_not_predict_epsilon_predict_the_sample(tmp_path: Path, edit: Callable[..., None]) -> None:
    file = saved(tmp_path)
    values = {name: value for name, value in json.loads(file.read_text()).items() if name != "prediction_type"}
    file.write_text(json.dumps({**values, "predict_epsilon": False}))
    assert read_schedule(file).prediction == "sample"
    edit(file, predict_epsilon=True)
    assert read_schedule(file).prediction == "epsilon"


def test_the_range_is_that_of_the_steps(tmp_path: Path) -> None:
    low, high = read_schedule(saved(tmp_path, **SCHEDULES["scaled_linear"])).sigma_range
    assert low == pytest.approx(0.0292, abs=1e-4)  # Stable Diffusion's, as k-diffusion prints them
    assert high == pytest.approx(14.6146, abs=1e-3)


def test_levels_of_the_table_are_whole_steps() -> None:
    schedule = linear()
    sigmas = schedule.log_sigmas.exp()
    assert torch.allclose(schedule.timesteps(sigmas), torch.arange(1000.0), atol=1e-3)


def test_levels_between_two_steps_are_linear_in_the_logarithm() -> None:
    schedule = VPSchedule(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), "epsilon")
    first, second, third = schedule.log_sigmas.tolist()
    sigma = torch.tensor([0.75 * first + 0.25 * second, 0.5 * second + 0.5 * third]).exp()
    assert torch.allclose(schedule.timesteps(sigma), torch.tensor([0.25, 1.5]), atol=1e-5)


def test_levels_outside_are_the_first_and_the_last_step() -> None:
    steps = linear().timesteps(torch.tensor([1e-6, 1e6]))
    assert steps.tolist() == [0.0, 999.0]
    assert steps.dtype == torch.float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_network_of_a_gaussian_is_the_exact_denoiser(prediction: str) -> None:
    mean, std = 0.3, 0.5
    sigma = torch.tensor([0.05, 1.0, 7.0, 100.0])
    x = mean + sigma.view(-1, 1, 1, 1) * normal(4, 2, 3, 3)

    def network(z: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        s = sigma.view(-1, 1, 1, 1).double()
        alpha, noise_share = 1 / (s**2 + 1).sqrt(), s / (s**2 + 1).sqrt()
        # E[clean | z] of z = alpha clean + noise_share noise, two independent Gaussians.
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + noise_share**2) * (z - alpha * mean)
        noise = (z - alpha * clean) / noise_share
        return {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - noise_share * clean}[prediction].float()

    s = sigma.view(-1, 1, 1, 1)
    expected = (std**2 * x + s**2 * mean) / (std**2 + s**2)
    assert torch.allclose(linear(prediction).denoise(network, x, sigma), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("step", [0, 300, 999])
def test_the_denoised_image_is_the_one_that_diffusers_predicts(tmp_path: Path, prediction: str, step: int) -> None:
    file = saved(tmp_path, prediction_type=prediction)
    scheduler = DDIMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(1000)
    z, output = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    expected = scheduler.step(output, step, z).pred_original_sample
    seen: list[torch.Tensor] = []

    def network(scaled: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        seen.extend([scaled, steps])
        return output

    alpha = scheduler.alphas_cumprod[step].sqrt()
    sigma = (1 / alpha**2 - 1).sqrt().repeat(2)
    denoised = read_schedule(file).denoise(network, z / alpha, sigma)
    assert torch.allclose(denoised, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(seen[0], z, atol=1e-4)
    assert torch.allclose(seen[1], torch.full((2,), float(step)), atol=0.05)


def test_a_file_without_prediction_type_is_of_epsilon(tmp_path: Path) -> None:
    file = saved(tmp_path)
    values = json.loads(file.read_text())
    del values["prediction_type"]  # as files before diffusers 0.9 are
    file.write_text(json.dumps(values))
    assert read_schedule(file).prediction == "epsilon"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, r"'FlowMatchEulerDiscreteScheduler' cannot be used; expected DDIM"),
        ({"_class_name": "LCMScheduler"}, r"'LCMScheduler' cannot be used"),
        ({"_class_name": ["a", "b"]}, r"cannot be used"),
        ({"beta_schedule": "sigmoid"}, r"beta_schedule: expected 'linear', 'scaled_linear' or 'squaredcos_cap_v2'"),
        ({"prediction_type": "flow_prediction"}, r"prediction_type: expected 'epsilon', 'v_prediction' or 'sample'"),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr: expected False; only VP schedules of finite noise"),
        ({"use_flow_sigmas": True}, r"use_flow_sigmas: expected False"),
        ({"timestep_type": "continuous"}, r"timestep_type: expected 'discrete'"),
        ({"beta_start": "small"}, r"beta_start: expected a number"),
        ({"beta_end": 1.0}, r"beta_end: expected a number less than 1"),
        ({"num_train_timesteps": 1}, r"num_train_timesteps: expected a number greater"),
        ({"trained_betas": [0.1]}, r"two or more numbers between 0 and 1"),
        ({"trained_betas": [0.1, 1.0]}, r"two or more numbers between 0 and 1"),
        ({"trained_betas": [0.1, math.nan]}, r"two or more numbers between 0 and 1"),
    ],
)
def test_other_schedules_are_refused_in_one_line(
    tmp_path: Path, edit: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    file = saved(tmp_path)
    edit(file, **changes)
    with pytest.raises(InputError, match=rf"scheduler_config.json.*{message}") as caught:
        read_schedule(file)
    assert "\n" not in str(caught.value)


def test_betas_must_be_in_the_file(tmp_path: Path) -> None:
    DDPMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    values = json.loads(file.read_text())
    del values["beta_start"]
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"scheduler_config.json: beta_start: Field required"):
        read_schedule(file)
