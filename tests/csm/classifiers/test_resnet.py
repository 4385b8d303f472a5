import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from csm.classifiers.resnet import ResNet, resnet18, resnet50, resnet101
from csm.errors import InputError

DEPTHS = {resnet18: (2, 2, 2, 2), resnet50: (3, 4, 6, 3), resnet101: (3, 4, 23, 3)}


# torchvision's documentation for ImageNet; for CIFAR-10 what the widely used networks with this stem have.
@pytest.mark.parametrize(
    ("network", "cifar", "imagenet"),
    [(resnet18, 11_173_962, 11_689_512), (resnet50, 23_520_842, 25_557_032), (resnet101, 42_512_970, 44_549_160)],
)
def test_as_many_parameters_as_published(network: Any, cifar: int, imagenet: int, count: Callable[..., int]) -> None:
    assert count(network, 3, 10) == cifar
    assert count(network, 3, 10, stem="tiny") == cifar
    assert count(network, 3, 1000, stem="imagenet") == imagenet


@pytest.mark.parametrize(("network", "channels", "n_classes"), [(resnet18, 1, 7), (resnet50, 3, 100), (resnet101, 3, 200)])
def test_parameters_by_table_1(network: Any, channels: int, n_classes: int, count: Callable[..., int]) -> None:
    four = 1 if network is resnet18 else 4
    total, inputs = channels * 9 * 64 + 128, 64
    for stage, depth in enumerate(DEPTHS[network]):
        width = 64 * 2**stage
        for number in range(depth):
            convolutions = [(inputs, width, 9), (width, width, 9)]
            if four == 4:
                convolutions = [(inputs, width, 1), (width, width, 9), (width, 4 * width, 1)]
            if number == 0 and (stage > 0 or four == 4):
                convolutions.append((inputs, four * width, 1))
            total += sum(a * b * pixels + 2 * b for a, b, pixels in convolutions)
            inputs = four * width
    assert count(network, channels, n_classes) == total + inputs * n_classes + n_classes


@pytest.mark.parametrize("bottleneck", [False, True])
def test_output_and_gradient_are_those_of_transformers(bottleneck: bool, seeded: Callable[..., Any]) -> None:
    """The same weights in both, in the order in which they are made; theirs has the stem for ImageNet."""
    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[(256 if bottleneck else 64) * 2**stage for stage in range(4)],
        depths=[2, 1, 2, 1],
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=5,
    )
    theirs = seeded(ResNetForImageClassification, config).double()
    ours = seeded(ResNet, 3, 5, (2, 1, 2, 1), bottleneck, "imagenet", False).double()
    for source, target in ((theirs.resnet.embedder, ours.body[:4]), (theirs.classifier, ours.head)):
        copy(source, target)
    blocks = [layer for stage in theirs.resnet.encoder.stages for layer in stage.layers]
    for block, other in zip(blocks, ours.body[4:-2], strict=True):
        copy(block.layer, other.residual)
        copy(block.shortcut, other.shortcut)
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 64, 64, generator=draw, dtype=torch.float64)
    for training in (True, False):  # the first moves the running statistics, the second uses them
        expected, found = theirs.train(training)(images).logits, ours.train(training)(images)
        assert torch.allclose(found, expected, atol=1e-8)
        assert expected.std() > 0.01
    gradients = []
    for model, logits in ((theirs, theirs(images).logits), (ours, ours(images))):
        logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    norms = [sorted(float(gradient.norm()) for gradient in one) for one in gradients]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def copy(source: nn.Module, target: nn.Module) -> None:
    values = list(source.state_dict().values())
    names = list(target.state_dict())
    target.load_state_dict(dict(zip(names, values, strict=True)))


def test_weights_are_drawn_as_he_et_al_do(seeded: Callable[..., Any]) -> None:
    network = seeded(resnet18, 3, 10)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


def test_with_zero_init_every_block_is_its_shortcut(seeded: Callable[..., Any]) -> None:
    network = seeded(resnet50, 3, 10, zero_init=True)
    blocks = [module for module in network.body if hasattr(module, "residual")]
    assert len(blocks) == 16
    x = torch.rand(2, 64, 4, 4)
    assert torch.equal(blocks[0](x), blocks[0].shortcut(x).relu())
    assert not torch.equal(seeded(resnet50, 3, 10).body[3](x), blocks[0](x))


@pytest.mark.parametrize(("stem", "side"), [("cifar", 4), ("tiny", 2), ("imagenet", 1)])
def test_a_stem_leaves_of_32_pixels(stem: str, side: int, seeded: Callable[..., Any]) -> None:
    network = seeded(resnet18, 3, 10, stem=stem).eval()
    assert network.body[:-2](torch.zeros(1, 3, 32, 32)).shape == (1, 512, side, side)


def test_an_unknown_stem_is_named() -> None:
    with pytest.raises(InputError, match="stem: unknown 'small'; one of cifar, tiny, imagenet"):
        resnet18(3, 10, stem="small")
