"""A UNet of a moment's training, and what it is trained on."""

from typing import Any

import torch

from csm.generators.config import GeneratorConfig
from csm.generators.fitting import fit_generator
from csm.generators.unet import UNetGenerator

TINY = GeneratorConfig(block_channels=(8, 16), steps=6, batch_size=8, dropout=0.1, checkpoint_steps=3, ema_halflife=40)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes along one axis or the other, uint8 (12, 1, 4, 4)."""
    stripes = torch.tensor([0, 255, 0, 255], dtype=torch.uint8)
    rows = stripes.view(1, 4, 1).expand(6, 1, 4, 4)
    columns = stripes.view(1, 1, 4).expand(6, 1, 4, 4)
    return torch.cat([rows, columns]), torch.tensor([0, 1]).repeat_interleave(6)


def fit(config: GeneratorConfig = TINY, **extra: Any) -> UNetGenerator:
    images, labels = data()
    return fit_generator(images, labels, 2, config, **extra)


def noisy_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images with no symmetry, uint8 (12, 1, 4, 4)."""
    images = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    return images, torch.tensor([0, 1]).repeat(6)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
