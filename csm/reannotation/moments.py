"""Moments of the real images' features as running sums in float64; no feature matrix."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from csm.errors import InputError

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]

LIMIT = 2**30  # bytes of scatter matrices that a fit may hold
CHUNK = 4096  # features that are in float64 together


@dataclass(frozen=True)
class Scatter:
    """Sums about the class means, float64; the first axis is the class, of length 1 if the classes are pooled.

    Attributes:
        counts: (C,) images.
        scatter: (C, F, F), sum of (x - m)(x - m)'.
        fourth: (C,), sum of ||x - m||^4.
    """

    counts: torch.Tensor
    scatter: torch.Tensor
    fourth: torch.Tensor

    def pooled(self) -> "Scatter":
        """All classes together."""
        return Scatter(*(value.sum(dim=0, keepdim=True) for value in (self.counts, self.scatter, self.fourth)))

    def covariance(self, row: int, shrinkage: float | None = None) -> torch.Tensor:
        """Covariance (F, F) of row ``row``: (1 - shrinkage) S + shrinkage tr(S)/F I, S = scatter / counts.

        ``shrinkage`` in [0, 1]; None takes Ledoit and Wolf's.
        """
        sample = self.scatter[row] / self.counts[row]
        amount = self.ledoit_wolf(row) if shrinkage is None else shrinkage
        return (1 - amount) * sample + amount * sample.trace() / len(sample) * torch.eye(len(sample), dtype=torch.float64)

    def pooled_covariances(self, pooling: float, shrinkage: float | None) -> Iterator[torch.Tensor]:
        """Of each class (1 - pooling) times its own ``covariance`` plus pooling times that of all classes together."""
        common = self.pooled().covariance(0, shrinkage)
        for row in range(len(self.counts)):
            yield (1 - pooling) * self.covariance(row, shrinkage) + pooling * common

    def ledoit_wolf(self, row: int) -> float:
        """The shrinkage in [0, 1] of least expected squared error of row ``row``.

        b^2 / d^2 of Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate Analysis
        88, 2004, lemmas 3.3 and 3.4: d^2 = ||S - m I||^2, b^2 = min(d^2, mean over images of ||x x' - S||^2 / n).
        """
        n = self.counts[row]
        sample = self.scatter[row] / n
        square = sample.square().sum()
        distance = square - sample.trace().square() / len(sample)
        if not distance > 0:  # a multiple of the unit matrix, or no spread at all
            return 0.0
        noise = (self.fourth[row] / n - square) / n
        return float((noise / distance).clamp(0, 1))


def class_means(batches: Batches, n_classes: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of each class float64 (K,) and their mean feature float64 (K, F), over batches (features (N, F), labels int64 (N,)).

    Raises:
        InputError: a class has no image, or a feature is not finite; ``where`` begins the message.
    """
    total: torch.Tensor | None = None
    counts = torch.zeros(n_classes, dtype=torch.float64)
    for features, labels in finite(batches, where):
        if total is None:
            total = torch.zeros(n_classes, features.shape[1], dtype=torch.float64)
        total.index_add_(0, labels, features.double())
        counts += torch.bincount(labels, minlength=n_classes)
    if total is None or (counts == 0).any():
        raise InputError(f"{where}: class {int((counts == 0).nonzero()[0])} has no training image")
    return counts, total / counts[:, None]


def pooled_scatter(batches: Batches, means: torch.Tensor) -> Scatter:
    """Within-class scatter of all classes together, about ``means`` float64 (K, F)."""
    return _scatter(batches, means, 1, torch.zeros_like)


def class_scatters(batches: Batches, means: torch.Tensor) -> Scatter:
    """Scatter of every class about its mean, ``means`` float64 (K, F)."""
    return _scatter(batches, means, len(means), lambda labels: labels)


def finite(batches: Batches, where: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``batches``; ``InputError`` that begins with ``where`` if a feature is not finite."""
    for features, labels in batches:
        if not features.isfinite().all():
            raise InputError(f"{where}: a feature of a real image is not finite: check the encoder and the images")
        yield features, labels


def check_memory(where: str, matrices: int, size: int) -> None:
    """Raise ``InputError`` if ``matrices`` scatter matrices of ``size`` x ``size`` are more than ``LIMIT`` bytes."""
    held = 8 * matrices * size**2
    if held > LIMIT:
        raise InputError(
            f"{where}: {matrices} covariances of {size} x {size} take {held / 2**30:.1f} GiB, the limit is {LIMIT / 2**30:.0f} GiB: "
            "take an encoder of fewer features (pca), or head linear"
        )


def _scatter(batches: Batches, means: torch.Tensor, rows: int, row: Callable[[torch.Tensor], torch.Tensor]) -> Scatter:
    size = means.shape[1]
    counts, fourth = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))
    scatter = torch.zeros(rows, size, size, dtype=torch.float64)
    for features, labels in batches:
        for x, label in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            centred, group = x.double() - means[label], row(label)
            for index in group.unique().tolist():
                own = centred[group == index]
                counts[index] += len(own)
                scatter[index].addmm_(own.T, own)
                fourth[index] += own.square().sum(dim=1).square().sum()
    return Scatter(counts, scatter, fourth)
