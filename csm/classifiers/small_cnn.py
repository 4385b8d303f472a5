"""A small convolutional network for small images (8 to 32 pixels)."""

import torch
from torch import nn

from csm.errors import InputError


class SmallCNN(nn.Module):
    """Two stages of two 3x3 convolutions (BatchNorm, ReLU), halved in between, mean-pooled, one linear layer.

    Args:
        channels: of the image.
        n_classes: K.
        width: channels of the first stage; the second has twice as many.
        pool: side of the grid of means that the second stage ends in. 1 forgets where in the image something is, which helps where
            things move; data that know no other place than their own want more, up to half the side of the image.
    """

    def __init__(self, channels: int, n_classes: int, width: int = 32, pool: int = 1) -> None:
        if width < 1 or pool < 1:
            raise InputError(f"expected width and pool of at least 1, got {width} and {pool}")
        super().__init__()
        self.body = nn.Sequential(
            *_block(channels, width), *_block(width, width), nn.MaxPool2d(2),
            *_block(width, 2 * width), *_block(2 * width, 2 * width), nn.AdaptiveAvgPool2d(pool), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width * pool**2, n_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate features (N, 2 * width * pool^2) of normalised images (N, C, H, W)."""
        features: torch.Tensor = self.body(x)
        return features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits: torch.Tensor = self.head(self.features(x))
        return logits


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
