"""Densely connected networks (Huang et al. 2017)."""

import torch
from torch import nn

from csm.classifiers.convolutional import Convolutional, activated, stem_layers
from csm.errors import InputError

SMALLEST = {"cifar": 8, "tiny": 15, "imagenet": 29}  # sides of images of which the stem leaves 8, that three transitions halve


class DenseNet(Convolutional):
    """Four dense blocks with transitions between them: DenseNet-BC, compression 0.5 (section 3 and table 1).

    Args:
        channels: of the image.
        n_classes: K.
        depths: layers of each block.
        growth: channels that a layer adds, k.
        stem: "cifar", "tiny" or "imagenet", see ``stem_layers``; 2 k channels.

    Raises:
        InputError: there is no such stem; when called, the images are smaller than ``SMALLEST``.
    """

    def __init__(self, channels: int, n_classes: int, depths: tuple[int, ...], growth: int, stem: str) -> None:
        width = 2 * growth
        layers = stem_layers(stem, channels, width, activate=False)
        for number, depth in enumerate(depths):
            if number:
                layers += [*activated(width, width // 2, 1), nn.AvgPool2d(2)]
                width //= 2
            layers += [Layer(width + index * growth, growth) for index in range(depth)]
            width += depth * growth
        super().__init__([*layers, nn.BatchNorm2d(width), nn.ReLU(inplace=True)], width, n_classes)
        self.smallest = SMALLEST[stem]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        if min(height, width) < self.smallest:
            least = f"{self.smallest} x {self.smallest}"
            raise InputError(f"images of {height} x {width} are too small; with this stem they have at least {least}")
        return super().features(x)


class Layer(nn.Module):
    """``growth`` new channels, of a 1x1 convolution to four times as many and a 3x3 one, beside those of the input (eq. 2)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.new = nn.Sequential(*activated(inputs, 4 * growth, 1), *activated(4 * growth, growth, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.new(x)], dim=1)


def densenet121(channels: int, n_classes: int, stem: str = "cifar") -> DenseNet:
    """DenseNet-121 of growth 32; the arguments are those of ``DenseNet``."""
    return DenseNet(channels, n_classes, (6, 12, 24, 16), 32, stem)
