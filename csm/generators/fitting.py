"""Training of a class-conditional diffusion model, on one device or data-parallel on many."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from csm import storage
from csm.datasets import RealDataset
from csm.generators.config import GeneratorConfig
from csm.generators.unet import NO_CLASS, UNetGenerator, UNetSpec
from csm.world import ALONE, CPU, World, from_first, to_device, together

OnStep = Callable[[int, float], None]
CUDA_REPORT_STEPS = 10  # reading a loss waits for the device, which should have the next steps queued meanwhile


@dataclass(frozen=True)
class FitJob:
    """A training as files; all paths are on storage that every process sees.

    Attributes:
        data: the folder that holds ``dataset.json`` and ``real/``.
        directory: where the generator goes, and ``state.pt`` until the caller removes it.
        config: network and training.
        fingerprint: of everything that the result depends on; a state with another one is not gone on from.
    """

    data: Path
    directory: Path
    config: GeneratorConfig
    fingerprint: str


def fit_job(job: FitJob, on_step: OnStep | None = None, device: torch.device = CPU, world: World = ALONE) -> None:
    """Train the generator of ``job`` and save it in ``job.directory``, going on from ``state.pt`` there if it is of this job.

    Rank 0 alone reads the state and writes files; the state does not depend on the number of processes, which may be another one next
    time.

    Args:
        job: what to train, from what, into which folder.
        on_step: called on rank 0 with (step, loss) for every step from 1, those before an interruption too.
        device: of this process.
        world: this process and the others.

    Raises:
        InputError: the data or the state is missing or damaged; on every rank.
        FloatingPointError: the loss is not finite; on every rank.
    """
    state_path = job.directory / "state.pt"

    def read() -> tuple[RealDataset, dict[str, Any] | None]:
        state = storage.read_state(state_path) if world.rank == 0 and state_path.is_file() else None
        if state is not None and state["fingerprint"] != job.fingerprint:
            state = None  # it was interrupted under other settings
        return RealDataset.load(job.data), state

    data, state = together(read, world)
    images, labels = data.split("train")
    losses: list[float] = []

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        if on_step:
            on_step(step, loss)

    def save_state(training: dict[str, Any]) -> None:
        storage.write_state(state_path, {"fingerprint": job.fingerprint, "losses": losses, "training": training})

    for step, loss in enumerate(state["losses"] if state else [], start=1):
        record(step, loss)
    # From rank 0 rather than read by each: a network file system may show an older file on another node.
    training = from_first(state["training"] if state else None, world)
    generator = fit_generator(images, labels, data.info.n_classes, job.config, record, save_state, training, device, world)
    if world.rank == 0:
        generator.save(job.directory)


def fit_generator(
    images: torch.Tensor,
    labels: torch.Tensor,
    n_classes: int,
    config: GeneratorConfig,
    on_step: OnStep | None = None,
    save_state: Callable[[dict[str, Any]], None] | None = None,
    state: dict[str, Any] | None = None,
    device: torch.device = CPU,
    world: World = ALONE,
) -> UNetGenerator:
    """Train on real images and return the generator with averaged (EMA) weights, on ``device``.

    The loss is lambda(sigma) ||D(x + sigma n; sigma, c) - x||^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM,
    eq. 2 and table 1).

    On one CPU process, a pure function of the data, the configuration and the number of threads: each step draws from its own seed,
    so a run that goes on from a saved state does what an undisturbed one does. Several processes share every batch: all of them draw
    the same rows, noise levels and noise on the CPU, rank r takes rows r, r + size, ..., and the gradients are averaged. So n processes
    do what one does, up to the order of sums. The exception is dropout, whose masks each process draws for itself.

    Args:
        images: uint8 (N, C, H, W), the train split only; like all arguments but ``device`` and ``world``, the same on every rank.
        labels: int64 (N,).
        n_classes: K.
        config: network and training.
        on_step: called on rank 0 with (step, loss) of every step, in order, steps counted from 1; on CUDA some steps later.
        save_state: called on rank 0 with a state for ``storage.write_state`` every ``config.checkpoint_steps`` steps.
        state: a state to go on from, of any number of processes and any device.
        device: of this process.
        world: this process and the others.

    Raises:
        FloatingPointError: the loss is not finite; on every rank.
        ValueError: more processes than images in a batch.
    """
    if world.size > config.batch_size:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {world.size} processes")
    torch.manual_seed(config.seed)
    model = UNetGenerator(_spec(images, n_classes, config)).to(device).train()
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    start = 0
    if state is not None:
        start = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    untold: list[torch.Tensor] = []  # this rank's share of the losses of the latest steps, on the device

    def tell(step: int) -> None:
        """Tell the losses up to ``step``. All ranks get here together and see the same, so all of them stop at a bad one."""
        for number, loss in enumerate(_means(untold, world), start=step - len(untold) + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(f"generator training: loss is {loss} at step {number}; lower generator.learning_rate")
            if on_step and world.rank == 0:
                on_step(number, loss)
        untold.clear()

    for step in range(start, config.steps):
        batch = _draw(images, labels, config, step)
        # Dropout draws from the global generator; far apart, the ranks share no masks.
        torch.manual_seed(config.seed * 1_000_003 + step + world.rank * 2**40)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.steps)
        optimizer.zero_grad(set_to_none=True)
        untold.append(_backward(network, model.spec.sigma_data, batch, config, device, world))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _update_average(average, model, config, step)
        keeping = (step + 1) % config.checkpoint_steps == 0 and step + 1 < config.steps
        if keeping or step + 1 == config.steps or device.type == "cpu" or (step + 1) % CUDA_REPORT_STEPS == 0:
            tell(step + 1)
        if keeping and save_state and world.rank == 0:
            states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state({"step": step + 1, **states})
    return average.eval()


def _spec(images: torch.Tensor, n_classes: int, config: GeneratorConfig) -> UNetSpec:
    height, width = images.shape[2:]
    return UNetSpec(
        shape=(height, width, images.shape[1]),
        n_classes=n_classes,
        sigma_data=float(_to_float(images).std()),
        block_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        dropout=config.dropout,
        attention_levels=config.attention_levels,
        label_dropout=config.label_dropout,
    )


class _Batch(NamedTuple):
    """Rows of a step: images uint8 (B, C, H, W), labels int64 (B,), noise levels float32 (B,), noise float32 (B, C, H, W).

    Labels may be ``NO_CLASS``.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sigma: torch.Tensor
    noise: torch.Tensor


def _draw(images: torch.Tensor, labels: torch.Tensor, config: GeneratorConfig, step: int) -> _Batch:
    """The whole batch of ``step``, the same on every rank and for every device."""
    draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = torch.randint(0, len(images), (config.batch_size,), generator=draw)
    chosen = images[rows]
    sigma = (config.p_mean + config.p_std * torch.randn(len(rows), generator=draw)).exp()
    noise = torch.randn(chosen.shape, generator=draw)
    if config.flip:
        mirrored = torch.rand(len(rows), generator=draw) < 0.5
        chosen = torch.where(mirrored.view(-1, 1, 1, 1), chosen.flip(-1), chosen)
    shown = labels[rows]
    if config.label_dropout:
        shown = shown.masked_fill(torch.rand(len(rows), generator=draw) < config.label_dropout, NO_CLASS)
    return _Batch(chosen, shown, sigma, noise)


def _backward(
    network: torch.nn.Module, sigma_data: float, batch: _Batch, config: GeneratorConfig, device: torch.device, world: World
) -> torch.Tensor:
    """Add the gradients of this rank's rows of ``batch``; the mean over ranks of what is returned is the loss of the whole batch."""
    mine = [column[world.rank :: world.size].split(config.micro_batch or config.batch_size) for column in batch]
    parts = [_Batch(*columns) for columns in zip(*mine, strict=True)]
    total = torch.zeros((), device=device)
    for part in parts:
        # Gradients travel once for each step, with the last part.
        waits = isinstance(network, DistributedDataParallel) and part is not parts[-1]
        with network.no_sync() if waits else nullcontext():  # type: ignore[operator]
            images, labels, sigma, noise = (to_device(column, device) for column in part)
            clean = _to_float(images)
            noisy = clean + sigma.view(-1, 1, 1, 1) * noise
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                denoised = network(noisy, sigma, labels)
            weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
            loss = (weight.view(-1, 1, 1, 1) * (denoised - clean).square()).mean()
            loss = loss * (len(clean) * world.size / config.batch_size)  # its rows' part of the mean over ranks
            loss.backward()
        total += loss.detach()
    return total


def _means(losses: list[torch.Tensor], world: World) -> list[float]:
    """Means over the ranks of ``losses``, scalars."""
    stacked = torch.stack(losses)
    if world.size > 1:
        distributed.all_reduce(stacked)
        stacked /= world.size
    values: list[float] = stacked.tolist()
    return values


def _to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over 5 % of the steps, then a cosine to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _update_average(average: UNetGenerator, model: UNetGenerator, config: GeneratorConfig, step: int) -> None:
    """Exponential moving average; in the beginning it forgets faster, so that the random start does not linger."""
    seen = (step + 1) * config.batch_size
    halflife = min(config.ema_halflife, 0.05 * seen)
    decay = 0.5 ** (config.batch_size / max(halflife, 1e-8))
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(model.parameters()), 0)
