"""Mixing of the pixels of real images, in whole batches on the device that holds them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from csm.errors import InputError
from csm.losses.loss import Loss, Positive
from csm.parameters import check_parameters

SETTINGS = ConfigDict(extra="forbid")


class PixelMixing:
    """A kind of pixel mixing. Subclasses are frozen dataclasses of their settings.

    Attributes:
        replaces: whether the network trains on the mixture in place of the real images, with any loss of ``HARD``; if not, it sees
            both and ``loss`` is the whole loss.
    """

    replaces: ClassVar[bool] = True

    def mix(self, images: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix each image with another of the batch.

        Args:
            images: (N, C, H, W) of any dtype, on any device.
            target: class probabilities (N, K), on the device of the images.
            generator: on the CPU; what is drawn does not depend on the device of the images.

        Returns:
            Mixed images float32 (N, C, H, W) and mixed targets (N, K).
        """
        raise NotImplementedError

    def loss(
        self, hard: Loss, logits: torch.Tensor, target: torch.Tensor, mixed_logits: torch.Tensor, mixed_target: torch.Tensor
    ) -> torch.Tensor:
        """Loss of real images and of their mixtures, both (N, K), by the loss ``hard`` of the method. Only where not ``replaces``."""
        raise NotImplementedError


@dataclass(frozen=True, config=SETTINGS)
class Mixup(PixelMixing):
    """r x_i + (1 - r) x_j, targets likewise; one r from Beta(alpha, alpha) for the batch (Zhang et al. 2018, eq. 1)."""

    alpha: Positive = 0.2

    def mix(self, images: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = _beta(self.alpha, generator)
        return _blend(ratio, images, target, _partners(images, generator))


def build_pixel_mixing(kind: str, parameters: Mapping[str, Any], where: str) -> PixelMixing:
    """Return ``PIXEL_MIXING[kind]`` with its settings; ``InputError`` naming the key ``where`` (the section of both) if it cannot be."""
    if kind not in PIXEL_MIXING:
        raise InputError(f"{where}.kind: unknown {kind!r}; one of {', '.join(PIXEL_MIXING)}")
    return PIXEL_MIXING[kind](**check_parameters(PIXEL_MIXING[kind], parameters, f"{where}.parameters"))


def _beta(alpha: float, generator: torch.Generator) -> float:
    # torch draws a Beta only from its global generator; numpy draws one from a seed that comes out of ours.
    seed = int(torch.randint(0, 2**31, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _partners(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(images), generator=generator).to(images.device)


def _blend(ratio: float, images: torch.Tensor, target: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = images.float()
    return ratio * pixels + (1 - ratio) * pixels[other], ratio * target + (1 - ratio) * target[other]


PIXEL_MIXING: dict[str, type[PixelMixing]] = {
    "mixup": Mixup,
}
