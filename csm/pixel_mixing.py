"""Mixing of the pixels of real images, in whole batches on the device that holds them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from csm.errors import InputError
from csm.losses.hard import cross_entropy
from csm.losses.loss import Loss, NonNegative, Positive, widen
from csm.parameters import STRICT, check_parameters


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


@dataclass(frozen=True, config=STRICT)
class Mixup(PixelMixing):
    """r x_i + (1 - r) x_j, targets likewise; one r from Beta(alpha, alpha) for the batch (Zhang et al. 2018, eq. 1)."""

    alpha: Positive = 0.2

    def mix(self, images: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = _beta(self.alpha, generator)
        return _blend(ratio, images, target, _partners(images, generator))


@dataclass(frozen=True, config=STRICT)
class CutMix(PixelMixing):
    """A box of another image pasted in, the same box for the whole batch; targets by its exact share of the pixels (Yun et al. 2019).

    With r from Beta(alpha, alpha) the box has sqrt(1 - r) of the height and of the width, rounded to pixels, around a pixel that is
    drawn uniformly; what reaches over the border is cut off, and the targets count what is left.
    """

    alpha: Positive = 1.0

    def mix(self, images: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = images.shape[2:]
        side = (1 - _beta(self.alpha, generator)) ** 0.5
        rows, columns = _span(height, side, generator), _span(width, side, generator)
        other = _partners(images, generator)
        mixed = images.to(torch.float32, copy=True)
        mixed[:, :, rows, columns] = images[other, :, rows, columns].float()
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        return mixed, (1 - pasted) * target + pasted * target[other]


@dataclass(frozen=True, config=STRICT)
class RegMixup(PixelMixing):
    """Loss of the real images + weight * cross-entropy of their mixup (Pinto et al. 2022, who take CE for both).

    The paper takes alpha = 20 for CIFAR-10 and 10 for CIFAR-100: most mixtures are near half and half.
    """

    replaces: ClassVar[bool] = False

    alpha: Positive = 10.0
    weight: NonNegative = 1.0

    def mix(self, images: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return Mixup(self.alpha).mix(images, target, generator)

    def loss(
        self, hard: Loss, logits: torch.Tensor, target: torch.Tensor, mixed_logits: torch.Tensor, mixed_target: torch.Tensor
    ) -> torch.Tensor:
        return hard(logits, target) + self.weight * cross_entropy(mixed_logits, mixed_target)


@dataclass(frozen=True, config=STRICT)
class RankMixup(PixelMixing):
    """Loss of the real images + weight * mean_i relu(max_k z'_ik - max_k z_ik + margin), z' the logits of the mixture of image i.

    The mixup-based ranking loss (MRL) of Noh et al. 2023, on logits, as their published code has it: a mixture should be less
    confident than its real image by ``margin``. Mixtures whose target is that of the real image (the partner is
    of its class, or nothing was mixed) count as 0 in the mean. The soft targets are used for nothing else. Their settings: alpha and
    margin 2 on CIFAR, 1 on Tiny-ImageNet. M-NDCG, their other loss, is not here.
    """

    replaces: ClassVar[bool] = False

    alpha: Positive = 2.0
    margin: NonNegative = 2.0
    weight: NonNegative = 0.1

    def mix(self, images: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return Mixup(self.alpha).mix(images, target, generator)

    def loss(
        self, hard: Loss, logits: torch.Tensor, target: torch.Tensor, mixed_logits: torch.Tensor, mixed_target: torch.Tensor
    ) -> torch.Tensor:
        above = widen(mixed_logits).amax(dim=1) - widen(logits).amax(dim=1)
        differs = (mixed_target - target).abs().amax(dim=1) > 1e-5
        return hard(logits, target) + self.weight * (differs * (above + self.margin).relu()).mean()


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


def _span(length: int, share: float, generator: torch.Generator) -> slice:
    """``share`` of ``length`` around a pixel drawn uniformly, cut off at the borders."""
    size = round(length * share)
    start = int(torch.randint(0, length, (1,), generator=generator)) - size // 2
    return slice(max(start, 0), min(start + size, length))


def _blend(ratio: float, images: torch.Tensor, target: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = images.float()
    return ratio * pixels + (1 - ratio) * pixels[other], ratio * target + (1 - ratio) * target[other]


PIXEL_MIXING: dict[str, type[PixelMixing]] = {
    "mixup": Mixup,
    "cutmix": CutMix,
    "regmixup": RegMixup,
    "rankmixup": RankMixup,
}
