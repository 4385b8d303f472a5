"""How a classifier is fitted, whatever the method: optimiser, learning rate, augmentation, precision."""

import math
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from csm.parameters import STRICT
from csm.precision import Precision

Choice = Literal["last", "val-nll", "val-accuracy"]


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """How long and how fast: the same for every method that is compared.

    Attributes:
        kind: SGD (with Nesterov's momentum) or AdamW.
        epochs: passes over the real training images.
        batch_size: real images of a step, of all workers together.
        learning_rate: the highest value of the schedule.
        momentum: of SGD; of AdamW it is beta 1, and beta 2 is 0.999.
        weight_decay: of all weights but those of one dimension (biases, normalisation) with AdamW; of all with SGD.
        schedule: ``one-cycle`` (linear up over the first tenth, cosine to 0), ``cosine`` (to 0), ``multi-step`` (times ``decay`` after each
            of the epochs ``milestones``) or ``constant``; the last three after ``warmup`` epochs of linear rise.
        clip: largest norm of the gradient; 0 does not clip.
        shift: random translation of real and mixed images, in pixels; ``flip``: mirror half of them; ``cutout``: side in pixels of a
            square that is covered with the mean colour.
        ema: decay for each step of an exponential moving average of the weights, which is what is measured and kept; 0 is off.
        choose: the epoch whose weights are kept: the last, or the best by the validation split (the earliest of equals).
        precision: of the network's arithmetic in training; the loss and every measurement are in float32. "auto" is bfloat16 where that
            is faster.
        channels_last: lay out images and weights as fast convolutions want them.
        compile: let torch.compile fuse the network; needs a C++ compiler on a CPU.
        hold: where the images wait: on the device, in the memory of the host, or on disk (``stream``); "auto" is the device if they fill
            less than 40 % of what is free there, else the host.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    epochs: int = Field(default=60, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["one-cycle", "cosine", "multi-step", "constant"] = "one-cycle"
    milestones: tuple[int, ...] = ()
    decay: float = Field(default=0.1, gt=0, le=1)
    warmup: int = Field(default=0, ge=0)
    clip: float = Field(default=2.0, ge=0)
    shift: int = Field(default=0, ge=0)
    flip: bool = False
    cutout: int = Field(default=0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    choose: Choice = "last"
    precision: Precision = "auto"
    channels_last: bool = False
    compile: bool = False
    hold: Literal["auto", "device", "host", "stream"] = "auto"


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of ``config`` for the weights of ``network``."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if config.kind == "sgd":
        return torch.optim.SGD(
            weights, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )  # fmt: skip
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999))


def learning_rate(config: OptimizerConfig, step: int, per_epoch: int) -> float:
    """Of ``step``, counted from 0 over the whole training of ``per_epoch`` steps an epoch."""
    steps = config.epochs * per_epoch
    rise = max(1, steps // 10) if config.schedule == "one-cycle" else config.warmup * per_epoch
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    if config.schedule in ("one-cycle", "cosine"):
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    if config.schedule == "multi-step":
        return float(config.learning_rate * config.decay ** sum(step >= epoch * per_epoch for epoch in config.milestones))
    return config.learning_rate
