"""Gaussian classes in any number, whose posterior is known, as small images."""

from typing import NamedTuple

import torch

SIDE = 8  # of an image, which has one channel
SHAPE = (SIDE, SIDE, 1)
LATENT = (
    12  # dimensions in which the class means lie: each class has some near ones and many far ones, as in data of many classes
)
ACCURACY = 0.8  # of the true posterior
REACH = 4.0  # standard deviations of a pixel that lie in 0..255
DRAWS = 4000  # on which the accuracy is set


class Law(NamedTuple):
    """K equally frequent Gaussian classes with independent pixels of one variance, in levels of 255: means (K, D), and the deviation."""

    means: torch.Tensor
    deviation: float

    def log_posterior(self, images: torch.Tensor) -> torch.Tensor:
        """Float64 (N, K) of uint8 images."""
        x = images.flatten(1).double() - self.means.mean(dim=0)
        centred = self.means - self.means.mean(dim=0)
        return ((x @ centred.T - centred.square().sum(dim=1) / 2) / self.deviation**2).log_softmax(dim=1)

    def draw(self, means: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Images uint8 (N, 1, SIDE, SIDE) about ``means`` (N, D)."""
        pixels = means + self.deviation * torch.randn(means.shape, generator=draw, dtype=torch.float64)
        return pixels.round().clamp(0, 255).byte().view(-1, 1, SIDE, SIDE)


def gaussian_classes(number: int, draw: torch.Generator) -> Law:
    """Means drawn in ``LATENT`` dimensions; the deviation is the one at which ``ACCURACY`` can be had."""
    basis = torch.linalg.qr(torch.randn(SIDE * SIDE, LATENT, generator=draw, dtype=torch.float64)).Q
    means = torch.randn(number, LATENT, generator=draw, dtype=torch.float64) @ basis.T
    labels = torch.randint(0, number, (DRAWS,), generator=draw)
    noise = torch.randn(DRAWS, SIDE * SIDE, generator=draw, dtype=torch.float64)

    def right(deviation: float) -> float:
        scores = (means[labels] + deviation * noise) @ means.T - means.square().sum(dim=1) / 2
        return (scores.argmax(dim=1) == labels).double().mean().item()

    low, high = 1e-3, 1e2
    for _ in range(24):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if right(middle) > ACCURACY else (low, middle)
    levels = 127.5 / (REACH * (means.var(dim=0).max() + low**2).sqrt().item())
    return Law(127.5 + levels * means, levels * low)
