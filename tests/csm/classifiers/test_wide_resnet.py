from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from csm.classifiers.wide_resnet import WideResNet, wide_resnet_26_10, wide_resnet_28_10
from csm.errors import InputError
from csm.parameters import check_parameters


def test_as_many_parameters_as_published(count: Callable[..., int]) -> None:
    assert count(wide_resnet_28_10, 3, 10) == 36_479_194
    assert count(wide_resnet_28_10, 3, 100) == 36_536_884


# Table 4 and 5 of the paper, in millions, for CIFAR-10 or -100: ten classes more or less do not move the last digit.
@pytest.mark.parametrize(
    ("depth", "factor", "millions"),
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (22, 8, 17.2), (16, 8, 11.0), (16, 10, 17.1), (22, 10, 26.8), (28, 10, 36.5)],
)
def test_the_family_is_as_large_as_published(depth: int, factor: int, millions: float, count: Callable[..., int]) -> None:
    assert count(WideResNet, 3, 10, depth, factor, "cifar", 0.0) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("channels", "n_classes"), [(3, 10), (1, 7)])
def test_parameters_by_hand(channels: int, n_classes: int, count: Callable[..., int]) -> None:
    before = after = 9 * channels * 16  # activation before the convolutions, or after the sum
    inputs = 16
    for width in (160, 320, 640):
        convolutions = 9 * (inputs * width + 7 * width * width) + inputs * width  # four blocks and the shortcut
        before += convolutions + 2 * inputs + 7 * 2 * width
        after += convolutions + 9 * 2 * width
        inputs = width
    head = 640 * n_classes + n_classes
    assert count(wide_resnet_28_10, channels, n_classes) == before + 2 * 640 + head
    assert count(wide_resnet_26_10, channels, n_classes) == after + 2 * 16 + head


def test_evaluation_by_hand(seeded: Callable[..., Any]) -> None:
    """One block a stage, written out with the layers' own weights."""
    network = seeded(WideResNet, 3, 5, 10, 2, "cifar", 0.3)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network.train()(x)  # moves the running statistics
    network.eval()
    convolutions = iter([module.weight for module in network.modules() if isinstance(module, nn.Conv2d)])
    norms = iter([module for module in network.modules() if isinstance(module, nn.BatchNorm2d)])

    def active(hidden: torch.Tensor) -> torch.Tensor:
        norm = next(norms)
        return F.relu(F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    hidden = F.conv2d(x, next(convolutions), padding=1)
    for stage in range(3):
        stride = 2 if stage else 1
        first = active(hidden)
        residual = F.conv2d(first, next(convolutions), stride=stride, padding=1)
        residual = F.conv2d(active(residual), next(convolutions), padding=1)
        hidden = residual + F.conv2d(first, next(convolutions), stride=stride)
    expected = network.head(active(hidden).mean(dim=(2, 3)))
    assert torch.allclose(network(x), expected, atol=1e-5)
    assert expected.std() > 0.01


def test_dropout_acts_in_training_only(seeded: Callable[..., Any]) -> None:
    x = torch.randn(4, 3, 8, 8)
    plain, dropping = (seeded(WideResNet, 3, 5, 10, 2, "cifar", dropout) for dropout in (0.0, 0.5))
    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    assert not torch.equal(plain.train()(x), seeded(dropping.train(), x))


@pytest.mark.parametrize(("dropout", "message"), [(-0.1, "greater than or equal to 0"), (1.0, "less than 1")])
def test_dropout_is_a_probability(dropout: float, message: str) -> None:
    with pytest.raises(InputError, match=f"p.dropout: expected a number {message}, got {dropout}"):
        check_parameters(wide_resnet_28_10, {"dropout": dropout}, "p", ("channels", "n_classes"))


@pytest.mark.parametrize("depth", [26, 4, 0])
def test_depths_that_the_family_does_not_have(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 6 n \\+ 4 with n > 0, got {depth}"):
        WideResNet(3, 10, depth, 2, "cifar", 0.0)
