import pytest
import torch
from torch.nn import functional as F

from csm.classifiers.small_cnn import SmallCNN
from csm.errors import InputError


def network(channels: int = 3, n_classes: int = 5, width: int = 4, pool: int = 1) -> SmallCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCNN(channels, n_classes, width, pool).eval()


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


@pytest.mark.parametrize("pool", [1, 3])
def test_evaluation_by_hand(pool: int) -> None:
    model, x = network(pool=pool), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    weights = list(model.parameters())
    hidden = x
    for stage in range(4):
        # New BatchNorm layers have running mean 0 and variance 1.
        hidden = F.relu(F.conv2d(hidden, weights[3 * stage], padding=1) / (1 + 1e-5) ** 0.5)
        if stage == 1:
            hidden = F.max_pool2d(hidden, 2)
    # Of 6x6 pixels 3x3 are left: each by itself, or their mean.
    features = hidden.flatten(1) if pool == 3 else hidden.mean(dim=(2, 3))
    assert features.shape[1] == 8 * pool**2
    logits = features @ weights[12].T + weights[13]
    assert torch.allclose(model(x), logits, atol=1e-5)
    assert logits.std() > 0.01


@pytest.mark.parametrize("setting", [{"width": 0}, {"pool": 0}])
def test_what_is_no_network_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected width and pool of at least 1"):
        network(**setting)
