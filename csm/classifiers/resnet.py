"""Residual networks (He et al. 2016, "Deep Residual Learning for Image Recognition")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from csm.classifiers.convolutional import Convolutional, convolution, stem_layers


class ResNet(Convolutional):
    """Stages of residual blocks, each but the first halving the map and doubling the channels (table 1).

    Shortcuts are projections where the shape changes, else identities (option B of section 4.1); a bottleneck strides in its 3x3
    convolution. Images may have any size: maps of one pixel stay so.

    Args:
        channels: of the image.
        n_classes: K.
        depths: blocks of each stage.
        bottleneck: blocks are 1x1, 3x3, 1x1 with four times as many channels at their end (figure 5, right), not 3x3, 3x3.
        stem: "cifar", "tiny" or "imagenet", see ``stem_layers``.
        zero_init: the last BatchNorm of every block starts at 0, so that the block is the identity (Goyal et al. 2017, section 5.1).
        inputs: channels of the stem.
        width: channels of the first stage; of its 3x3 convolutions, if they are bottlenecks.

    Raises:
        InputError: there is no such stem.
    """

    def __init__(
        self,
        channels: int,
        n_classes: int,
        depths: Sequence[int],
        bottleneck: bool,
        stem: str,
        zero_init: bool,
        inputs: int = 64,
        width: int = 64,
    ) -> None:
        layers = stem_layers(stem, channels, inputs, activate=True)
        for stage, depth in enumerate(depths):
            for number in range(depth):
                block = Block(inputs, width * 2**stage, 2 if stage > 0 and number == 0 else 1, bottleneck)
                inputs = block.outputs
                layers.append(block)
        super().__init__(layers, inputs, n_classes)
        if zero_init:
            for module in self.modules():
                if isinstance(module, Block):
                    nn.init.zeros_(module.residual[-1].weight)  # type: ignore[arg-type]


class Block(nn.Module):
    """relu(residual(x) + shortcut(x)), eq. 2; ``outputs`` are its channels."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, self.outputs, 1, 1)]
        layers = [layer for shape in shapes for layer in (*convolution(*shape), nn.ReLU(inplace=True))]
        self.residual = nn.Sequential(*layers[:-1])  # the last ReLU comes after the sum
        same = stride == 1 and inputs == self.outputs
        self.shortcut = nn.Sequential() if same else nn.Sequential(*convolution(inputs, self.outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def resnet18(channels: int, n_classes: int, stem: str = "cifar", zero_init: bool = False) -> ResNet:
    """ResNet-18; the arguments are those of ``ResNet``."""
    return ResNet(channels, n_classes, (2, 2, 2, 2), False, stem, zero_init)


def resnet50(channels: int, n_classes: int, stem: str = "cifar", zero_init: bool = False) -> ResNet:
    """ResNet-50; the arguments are those of ``ResNet``."""
    return ResNet(channels, n_classes, (3, 4, 6, 3), True, stem, zero_init)


def resnet101(channels: int, n_classes: int, stem: str = "cifar", zero_init: bool = False) -> ResNet:
    """ResNet-101; the arguments are those of ``ResNet``."""
    return ResNet(channels, n_classes, (3, 4, 23, 3), True, stem, zero_init)
