from collections.abc import Callable

import numpy as np
import pytest

from csm.datasets import RealDataset
from csm.datasets.real import build


@pytest.fixture(scope="session")
def real() -> Callable[..., RealDataset]:
    """``real(shape, class_names)`` is a data set of random images, 4 of each class in every split."""

    def make(shape: tuple[int, int, int] = (32, 32, 3), class_names: tuple[str, ...] = ("cat", "dog", "owl")) -> RealDataset:
        n = len(class_names)
        images = np.random.default_rng(7).integers(0, 256, (12 * n, *shape), dtype=np.uint8)
        return build("tiny", images, np.arange(12 * n) % n, np.repeat(["train", "val", "test"], 4 * n), class_names)

    return make
