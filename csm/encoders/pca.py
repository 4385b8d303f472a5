"""Principal components of the pixels of the training images."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.encoders.pixels import Pixels
from csm.encoders.sources import Sources
from csm.errors import InputError

NUMBERS = 4096  # C * H * W at most: the covariance has as many rows, and its eigenvectors take the third power of that


class PCA(nn.Module):
    """uint8 (N, C, H, W) -> float32 (N, F): coordinates along the principal components, in the units of ``Pixels``, not whitened."""

    mean: torch.Tensor
    components: torch.Tensor

    def __init__(self, mean: torch.Tensor, components: torch.Tensor) -> None:
        """``mean`` float32 (D,) and orthonormal ``components`` float32 (D, F), D = C * H * W."""
        super().__init__()
        self.pixels = Pixels()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.pixels(images)
        if pixels.shape[1] != len(self.mean):
            raise InputError(
                f"pca: it was fitted on images of {len(self.mean)} numbers, these have {pixels.shape[1]}: fit the annotators again"
            )
        return (pixels - self.mean) @ self.components


@torch.no_grad()
def fit_pca(sources: Sources, batches: Callable[[], Iterable[torch.Tensor]], components: int = 32) -> None:
    """Keep mean and first principal components of the training images in ``sources.fitted``.

    Mean and covariance are running sums in float64; of the two signs of a component, the one that makes its largest number positive.

    Args:
        batches: gives batches of the training images uint8 (N, C, H, W).
        components: F, how many.

    Raises:
        InputError: the images are too large, there are none, or they do not vary in as many directions.
    """
    if components < 1:
        raise InputError(f"components: expected a number of at least 1, got {components}")
    count, total, products = 0, torch.zeros(0), torch.zeros(0)
    for images in batches():
        size = images.shape[1:].numel()
        if size > NUMBERS:
            raise InputError(
                f"pca: images of {size} numbers are too large, it takes at most {NUMBERS}: "
                "set data.size lower, or take another encoder"
            )
        pixels = Pixels()(images).double()
        if count == 0:
            total, products = (torch.zeros(*shape, dtype=torch.float64) for shape in ((size,), (size, size)))
        count += len(pixels)
        total += pixels.sum(dim=0)
        products += pixels.T @ pixels
    if count == 0:
        raise InputError("pca: there are no training images")
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending
    rank = int((values > 1e-9 * values[-1].clamp(min=1e-3)).sum())
    if components > rank:
        raise InputError(f"pca: the training images vary in {rank} directions: set components to that or less, got {components}")
    first = vectors.flip(1)[:, :components]
    largest = first.gather(0, first.abs().argmax(dim=0, keepdim=True))
    storage.write_tensors(_file(sources), {"mean": mean.float(), "components": (first * largest.sign()).float()})


def load_pca(sources: Sources, components: int = 32) -> PCA:
    """What ``fit_pca`` kept.

    Raises:
        InputError: it is missing or damaged, or has another number of components.
    """
    tensors = storage.read_tensors(_file(sources))
    if tensors["components"].shape[1] != components:
        raise InputError(
            f"{_file(sources)} has {tensors['components'].shape[1]} components, not {components}: fit the annotators again"
        )
    return PCA(tensors["mean"], tensors["components"])


def _file(sources: Sources) -> Path:
    return sources.fitted / "pca.safetensors"
