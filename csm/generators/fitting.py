"""Training of a class-conditional diffusion model."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from csm.generators.config import GeneratorConfig
from csm.generators.unet import UNetGenerator, UNetSpec

OnStep = Callable[[int, float], None]


def fit_generator(
    images: torch.Tensor,
    labels: torch.Tensor,
    n_classes: int,
    config: GeneratorConfig,
    on_step: OnStep | None = None,
    save_state: Callable[[dict[str, Any]], None] | None = None,
    state: dict[str, Any] | None = None,
) -> UNetGenerator:
    """Train on real images and return the generator with averaged (EMA) weights.

    The loss is lambda(sigma) ||D(x + sigma n; sigma, c) - x||^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM,
    eq. 2 and table 1). A pure function of the data, the configuration and the number of threads: each step draws from its own seed,
    so a run that goes on from a saved state does what an undisturbed one does.

    Args:
        images: uint8 (N, C, H, W), the train split only.
        labels: int64 (N,).
        n_classes: K.
        config: network and training.
        on_step: called with (step, loss) after every step, steps counted from 1.
        save_state: called with a state for ``storage.write_state`` every ``config.checkpoint_steps`` steps.
        state: a state to go on from.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    data = images.float() / 127.5 - 1
    height, width = images.shape[2:]
    spec = UNetSpec(
        shape=(height, width, images.shape[1]),
        n_classes=n_classes,
        sigma_data=float(data.std()),
        block_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        dropout=config.dropout,
    )
    torch.manual_seed(config.seed)
    model = UNetGenerator(spec).train()
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    start = 0
    if state is not None:
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])

    for step in range(start, config.steps):
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout draws from the global generator
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        batch = torch.randint(0, len(data), (config.batch_size,), generator=draw)
        loss = _loss(model, data[batch], labels[batch], config, draw)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"generator training: loss is {loss.item()} at step {step + 1}; lower generator.learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _update_average(average, model, config, step)
        if on_step:
            on_step(step + 1, loss.item())
        if save_state and (step + 1) % config.checkpoint_steps == 0 and step + 1 < config.steps:
            states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state({"step": step + 1, **states})
    return average.eval()


def _loss(
    model: UNetGenerator, clean: torch.Tensor, labels: torch.Tensor, config: GeneratorConfig, draw: torch.Generator
) -> torch.Tensor:
    """Mean weighted squared error of one batch."""
    sigma = (config.p_mean + config.p_std * torch.randn(len(clean), generator=draw)).exp()
    noise = torch.randn(clean.shape, generator=draw)
    denoised = model.denoise(clean + sigma.view(-1, 1, 1, 1) * noise, sigma, model.embed(labels))
    data = model.spec.sigma_data
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return (weight.view(-1, 1, 1, 1) * (denoised - clean).square()).mean()


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over 5 % of the steps, then a cosine to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def _update_average(average: UNetGenerator, model: UNetGenerator, config: GeneratorConfig, step: int) -> None:
    """Exponential moving average; in the beginning it forgets faster, so that the random start does not linger."""
    seen = (step + 1) * config.batch_size
    halflife = min(config.ema_halflife, 0.05 * seen)
    decay = 0.5 ** (config.batch_size / max(halflife, 1e-8))
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
