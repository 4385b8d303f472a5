from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums over several threads round differently; the tests compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def separable() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Images uint8 (K * per_class, 1, 6, 6) whose class is the bright pair of rows, in random order, and labels."""

    def make(per_class: int, seed: int = 0, n_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        labels = torch.arange(n_classes).repeat(per_class)[torch.randperm(n_classes * per_class, generator=draw)]
        images = torch.randint(0, 120, (len(labels), 1, 6, 6), generator=draw)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 2 * label : 2 * label + 2] += 110
        return images.to(torch.uint8), labels

    return make
