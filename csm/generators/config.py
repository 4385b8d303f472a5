"""Settings of a generator and of its training."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.parameters import STRICT


@dataclass(frozen=True, config=STRICT)
class GeneratorConfig:
    """The model that mixes: imported from ``path``, or made from the train split.

    What is trained is a UNet2DModel, by the settings from ``block_channels`` on; the noise distribution is EDM's for CIFAR-10 (Karras et
    al. 2022, table 1).

    Attributes:
        path: file or folder of a model to import (``csm.generators.importing``); empty: make one from the data.
        kind: "auto" finds out what is at ``path``, and trains a "unet" where there is no path; "gaussians" fits one to each class;
            "truth" is the law that the images were drawn from, for data sets that know it (source gaussians).
        classes: of an imported model: its class for each class of the data set; empty: the same numbers.
        guidance: of an imported model: scale of classifier-free guidance where ``mix.guidance`` says none; 1 is none.
        prompt: of an imported text-to-image model: template in which ``{}`` stands for the class name.
        block_channels: channels of each resolution, halved from one to the next.
        attention_levels: so many of the lowest resolutions have self-attention.
        steps: optimiser steps of ``batch_size`` images.
        learning_rate: of AdamW, after a linear warm-up over the first 5 % of the steps, then falling to 0 as a cosine.
        ema_halflife: images after which the running average of the weights has forgotten half.
        p_mean, p_std: ln(sigma) ~ N(p_mean, p_std**2).
        label_dropout: show this share of the images without their class, which guidance needs (Ho & Salimans 2022, Alg. 1).
        flip: show half of the images mirrored left to right; for data whose classes stay what they are in a mirror.
        precision: of the passes through the network; weights, their average, the optimiser and the loss are float32 in any case.
        micro_batch: most images that go through a device at once, 0 for a worker's whole share of the batch. It bounds the memory and
            changes the result by no more than rounding, unless there is dropout.
        checkpoint_steps: how often the training state is kept.
    """

    path: str = ""
    kind: Literal["auto", "unet", "gaussians", "truth", "edm", "diffusers-unet", "dit", "stable-diffusion"] = "auto"
    classes: tuple[int, ...] = ()
    guidance: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    prompt: str = "a photo of a {}"
    block_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = Field(default=1, ge=1)
    attention_levels: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    ema_halflife: int = Field(default=6000, ge=1)
    p_mean: float = -1.2
    p_std: float = Field(default=1.2, gt=0)
    label_dropout: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch: int = Field(default=0, ge=0)
    checkpoint_steps: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0)
