"""Wide residual networks (Zagoruyko & Komodakis 2016)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from csm.classifiers.convolutional import Convolutional, activated, stem_layers
from csm.classifiers.resnet import ResNet


class WideResNet(Convolutional):
    """Three stages of 16, 32 and 64 times ``factor`` channels, of (depth - 4) / 6 blocks each (table 1).

    Images may have any size: maps of one pixel stay so.

    Args:
        channels: of the image.
        n_classes: K.
        depth: 6 n + 4.
        factor: k, by which it is wider than a residual network.
        stem: "cifar", "tiny" or "imagenet", see ``stem_layers``.
        dropout: probability between the two convolutions of a block (section 2.4; theirs is 0.3 where they use it).

    Raises:
        InputError: there is no such stem.
    """

    def __init__(self, channels: int, n_classes: int, depth: int, factor: int, stem: str, dropout: float) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 with n > 0, got {depth}")
        layers = stem_layers(stem, channels, 16, activate=False)
        inputs = 16
        for stage in range(3):
            width = 16 * 2**stage * factor
            for number in range(blocks):
                layers.append(Block(inputs, width, 2 if stage > 0 and number == 0 else 1, dropout))
                inputs = width
        super().__init__([*layers, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)], inputs, n_classes)


class Block(nn.Module):
    """Two 3x3 convolutions with pre-activation (figure 1d), added to the input; where the shape changes, to a 1x1 convolution of it.

    That convolution takes the activated input, as the residual does.
    """

    def __init__(self, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        *activation, first = activated(inputs, width, 3, stride)
        *middle, second = activated(width, width, 3)
        self.activation = nn.Sequential(*activation)
        self.residual = nn.Sequential(first, *middle, nn.Dropout(dropout), second)
        same = stride == 1 and inputs == width
        self.shortcut = None if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.activation(x)
        residual: torch.Tensor = self.residual(active)
        return residual + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet_28_10(
    channels: int, n_classes: int, stem: str = "cifar", dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
) -> WideResNet:
    """WRN-28-10; the arguments are those of ``WideResNet``."""
    return WideResNet(channels, n_classes, 28, 10, stem, dropout)


def wide_resnet_26_10(channels: int, n_classes: int, stem: str = "cifar", zero_init: bool = False) -> ResNet:
    """WRN-26-10 of the calibration literature (Mukhoti et al. 2020 and its successors); the arguments are those of ``ResNet``.

    It is not of the family above, whose depths are 6 n + 4: as many blocks as WRN-28-10, with the shortcuts' convolutions not counted,
    and each with its activation after the sum (He et al. 2016), so without dropout.
    """
    return ResNet(channels, n_classes, (4, 4, 4), False, stem, zero_init, inputs=16, width=160)
