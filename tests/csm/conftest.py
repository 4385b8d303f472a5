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


@pytest.fixture(scope="session")
def held_out_posterior() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-posteriors (600, 3) that are three times too certain and lean to class 0, and labels."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(600, 3, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    return (3 * truth + torch.tensor([3.0, 0.0, 0.0])).log_softmax(dim=1).float(), labels


@pytest.fixture(scope="session")
def held_out_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Shares (300, 3) whose log-odds are 6 (share - 0.5), and labels."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (300,), generator=draw)
    share = 0.5 + 0.8 * torch.randn(300, 3, generator=draw)
    own = torch.rand(300, 3, generator=draw) < torch.sigmoid(6 * (share - 0.5))
    return torch.where(own, share, 1 - share), labels
