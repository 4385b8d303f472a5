import pytest
import torch
from torch.nn import functional as F

from csm.schedules import MixedSet
from tests.csm.training.small import RATIOS, Separable, Split


@pytest.fixture(scope="module")
def real(separable: Separable) -> Split:
    return separable(16)


@pytest.fixture(scope="module")
def val(separable: Separable) -> Split:
    return separable(8, seed=1)


@pytest.fixture(scope="module")
def mixed(separable: Separable) -> MixedSet:
    """Pixel blends of the first image of each class, four ratios, two sets for each pair."""
    images, labels = separable(4, seed=2)
    pairs = [(0, 1), (0, 2), (1, 2)] * 2
    pictures, soft = [], []
    for number, (a, b) in enumerate(pairs):
        first, second = (images[labels == label][number // 3].float() for label in (a, b))
        for lam in RATIOS.tolist():
            pictures.append((lam * first + (1 - lam) * second).to(torch.uint8))
            soft.append(lam * F.one_hot(torch.tensor(a), 3) + (1 - lam) * F.one_hot(torch.tensor(b), 3))
    class_a, class_b = torch.tensor(pairs).unbind(dim=1)
    return MixedSet(torch.stack(pictures), torch.stack(soft), torch.arange(24).view(6, 4), class_a, class_b, RATIOS)
