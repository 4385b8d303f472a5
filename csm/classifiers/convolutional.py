"""What the convolutional networks share: their first layers, their last ones, and how their weights are drawn."""

from collections.abc import Sequence

import torch
from torch import nn

from csm.errors import InputError

STEMS = ("cifar", "tiny", "imagenet")  # for images of about 32, 64 and 224 pixels


class Convolutional(nn.Module):
    """Layers that end in a map of ``width`` channels, the mean over its positions, one linear layer.

    Convolutions have no bias and are drawn from a normal distribution of variance 2 / fan-out (He et al. 2015, eq. 14); BatchNorm starts
    as the identity of the normalised values; the linear layer is drawn as torch does, uniform within 1 / sqrt(width).

    Args:
        layers: from images (N, C, H, W) to maps (N, width, h, w).
        width: which is also the feature size.
        n_classes: K.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int, n_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate features (N, width) of normalised images (N, C, H, W)."""
        features: torch.Tensor = self.body(x)
        return features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K)."""
        logits: torch.Tensor = self.head(self.features(x))
        return logits


def stem_layers(stem: str, channels: int, width: int, activate: bool) -> list[nn.Module]:
    """The first layers, from images (N, channels, H, W) to ``width`` channels.

    Args:
        stem: "cifar": one 3x3 convolution of stride 1; "tiny": the same of stride 2, so that 64x64 images cost what 32x32 ones cost;
            "imagenet": a 7x7 convolution and a 3x3 max-pool, both of stride 2 (He et al. 2016, table 1).
        activate: BatchNorm and ReLU follow the convolution; without it, that is left to the blocks (networks of pre-activation), except
            in "imagenet", whose max-pool comes after them.

    Raises:
        InputError: there is no such stem.
    """
    if stem not in STEMS:
        raise InputError(f"stem: unknown {stem!r}; one of {', '.join(STEMS)}")
    if stem == "imagenet":
        return [*convolution(channels, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    layers = convolution(channels, width, 3, 2 if stem == "tiny" else 1)
    return [*layers, nn.ReLU(inplace=True)] if activate else layers[:1]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps height and width but for its stride, and BatchNorm."""
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


def activated(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """BatchNorm, ReLU and then the convolution (pre-activation, He et al. 2016b)."""
    convolve, _ = convolution(inputs, outputs, size, stride)
    return [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), convolve]
