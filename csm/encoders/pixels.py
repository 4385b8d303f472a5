"""The pixels themselves as a feature."""

import torch
from torch import nn

from csm.encoders.sources import Sources


class Pixels(nn.Module):
    """uint8 (N, C, H, W) -> float32 (N, C * H * W) in [-1, 1], channels first."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 127.5 - 1


def load_pixels(sources: Sources) -> Pixels:
    return Pixels()
