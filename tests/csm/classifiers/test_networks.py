"""What every convolutional network must do, whatever its architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from csm.classifiers import NETWORKS, ClassifierSpec, build_classifier, check_network
from csm.errors import InputError

CONVOLUTIONAL = [name for name in NETWORKS if name != "transformers"]
WIDTHS = {
    "small-cnn": 64,
    "resnet18": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "wide-resnet-28-10": 640,
    "wide-resnet-26-10": 640,
    "densenet121": 1024,
}


def images(rows: int = 2, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(1))


def test_all_are_known() -> None:
    assert list(NETWORKS) == [*WIDTHS, "transformers"]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_head_on_the_features_is_the_output(name: str, seeded: Callable[..., Any]) -> None:
    """Also on the digits: grey, 8x8."""
    network, x = seeded(NETWORKS[name], 1, 3).eval(), images(channels=1)
    before = x.clone()
    assert network.features(x).shape == (2, WIDTHS[name])
    assert network.head.in_features == WIDTHS[name]
    assert torch.equal(network.head(network.features(x)), network(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_bfloat16_and_channels_last_change_no_more_than_rounding(name: str, seeded: Callable[..., Any]) -> None:
    """Logits and gradients; the CPU's autocast stands for the GPU's.

    In evaluation mode: before training, deep networks with the statistics of a small batch turn any rounding into another result.
    """
    network, x = seeded(NETWORKS[name], 3, 3), images(4)

    def step(lower: bool) -> tuple[torch.Tensor, torch.Tensor]:
        layout = torch.channels_last if lower else torch.contiguous_format
        network.to(memory_format=layout).zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            logits = network(x.to(memory_format=layout))
        assert logits.dtype == (torch.bfloat16 if lower else torch.float32)
        logits.float().log_softmax(dim=1)[:, 0].sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        return logits.detach().float(), gradients[-2].clone()  # of the head

    network.eval()
    for expected, found in zip(step(False), step(True), strict=True):
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
        assert not torch.equal(found, expected)
    network.train()
    step(True)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_it_is_traced_whole_by_torch_compile(name: str, seeded: Callable[..., Any]) -> None:
    """Forward and backward without a break, by the tracer that comes before every backend."""
    network, x = seeded(NETWORKS[name], 3, 3), images(4)
    network.eval()
    expected = network(x)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    assert network.head.weight.grad is not None


def test_what_cannot_be_built_is_said_before_anything_runs() -> None:
    for name in CONVOLUTIONAL:
        check_network(name, {})
    with pytest.raises(InputError, match=r"^train.network resnet101: stem: unknown 'x'; one of cifar, tiny, imagenet$"):
        check_network("resnet101", {"stem": "x"})


def test_images_that_are_too_small_are_said_before_anything_runs() -> None:
    for name in CONVOLUTIONAL:
        check_network(name, {}, (8, 8, 1))
    for name in set(CONVOLUTIONAL) - {"densenet121", "small-cnn"}:
        check_network(name, {"stem": "imagenet"}, (1, 1, 1))
    with pytest.raises(InputError, match=r"^train.network densenet121: images of 7 x 8 are too small"):
        check_network("densenet121", {}, (7, 8, 3))


def test_a_seed_gives_the_weights(seeded: Callable[..., Any]) -> None:
    spec = ClassifierSpec("resnet18", {"stem": "tiny"}, 3, ("a", "b"), (0.5,) * 3, (0.2,) * 3)
    first, second = (seeded(build_classifier, spec).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
