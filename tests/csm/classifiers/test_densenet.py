from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from csm.classifiers.densenet import DenseNet, densenet121
from csm.errors import InputError


def test_as_many_parameters_as_published(count: Callable[..., int]) -> None:
    """torchvision's documentation for ImageNet; for CIFAR-10 what the widely used network with this stem has."""
    assert count(densenet121, 3, 10) == 6_956_298
    assert count(densenet121, 3, 1000, stem="imagenet") == 7_978_856


@pytest.mark.parametrize(("channels", "n_classes"), [(3, 10), (1, 7)])
def test_parameters_by_hand(channels: int, n_classes: int, count: Callable[..., int]) -> None:
    width, total = 64, 9 * channels * 64
    for number, depth in enumerate((6, 12, 24, 16)):
        if number:
            total += 2 * width + width * width // 2
            width //= 2
        for _ in range(depth):
            total += 2 * width + width * 128 + 2 * 128 + 9 * 128 * 32
            width += 32
    assert width == 1024
    assert count(densenet121, channels, n_classes) == total + 2 * width + width * n_classes + n_classes


def test_evaluation_by_hand(seeded: Callable[..., Any]) -> None:
    """Two blocks of two layers, written out with the layers' own weights."""
    network = seeded(DenseNet, 3, 5, (2, 2), 4, "cifar")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network.train()(x)  # moves the running statistics
    network.eval()
    convolutions = iter([module.weight for module in network.modules() if isinstance(module, nn.Conv2d)])
    norms = iter([module for module in network.modules() if isinstance(module, nn.BatchNorm2d)])

    def step(hidden: torch.Tensor) -> torch.Tensor:
        weight = next(convolutions)
        return F.conv2d(active(hidden), weight, padding=weight.shape[-1] // 2)

    def active(hidden: torch.Tensor) -> torch.Tensor:
        norm = next(norms)
        return F.relu(F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    maps = [F.conv2d(x, next(convolutions), padding=1)]
    for block in range(2):
        if block:
            maps = [F.avg_pool2d(step(torch.cat(maps, dim=1)), 2)]
        for _ in range(2):
            maps.append(step(step(torch.cat(maps, dim=1))))
    expected = network.head(active(torch.cat(maps, dim=1)).mean(dim=(2, 3)))
    assert torch.allclose(network(x), expected, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize(("stem", "smallest"), [("cifar", 8), ("tiny", 15), ("imagenet", 29)])
def test_images_that_are_too_small_are_refused(stem: str, smallest: int, seeded: Callable[..., Any]) -> None:
    network = seeded(densenet121, 3, 10, stem=stem).eval()
    assert network(torch.zeros(1, 3, smallest, smallest + 3)).shape == (1, 10)
    small = smallest - 1
    message = f"^images of {small + 4} x {small} are too small; with this stem they have at least {smallest} x {smallest}"
    with pytest.raises(InputError, match=message):
        network(torch.zeros(1, 3, small + 4, small))
