import pytest
import torch
from torch.nn import functional as F

from csm.classifiers.small_cnn import SmallCNN


def network(channels: int = 3, n_classes: int = 5, width: int = 4) -> SmallCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCNN(channels, n_classes, width).eval()


@pytest.mark.parametrize(("channels", "n_classes", "width"), [(1, 10, 32), (3, 2, 4)])
def test_shapes_of_the_weights(channels: int, n_classes: int, width: int) -> None:
    shapes = [tuple(parameter.shape) for parameter in network(channels, n_classes, width).parameters()]
    w, w2 = width, 2 * width
    assert shapes == [
        (w, channels, 3, 3), (w,), (w,), (w, w, 3, 3), (w,), (w,), (w2, w, 3, 3), (w2,), (w2,), (w2, w2, 3, 3), (w2,), (w2,),
        (n_classes, w2), (n_classes,),
    ]  # fmt: skip


def test_the_head_on_the_features_is_the_output() -> None:
    model, images = network(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert model.features(images).shape == (4, 8)
    assert torch.equal(model.head(model.features(images)), model(images))


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (32, 32)])
def test_the_image_may_have_any_size(size: tuple[int, int]) -> None:
    assert network()(torch.zeros(2, 3, *size)).shape == (2, 5)


def test_evaluation_by_hand() -> None:
    model, x = network(), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    weights = list(model.parameters())
    hidden = x
    for stage in range(4):
        # New BatchNorm layers have running mean 0 and variance 1.
        hidden = F.relu(F.conv2d(hidden, weights[3 * stage], padding=1) / (1 + 1e-5) ** 0.5)
        if stage == 1:
            hidden = F.max_pool2d(hidden, 2)
    logits = hidden.mean(dim=(2, 3)) @ weights[12].T + weights[13]
    assert torch.allclose(model(x), logits, atol=1e-5)
    assert logits.std() > 0.01
