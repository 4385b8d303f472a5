"""Class prototypes: the mean feature of each class's real images."""

from collections.abc import Iterable

import torch

from csm.errors import InputError


def class_prototypes(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], n_classes: int) -> torch.Tensor:
    """Mean feature of each class, float32 (K, F), as a running sum in float64 over batches (features (N, F), labels int64 (N,)).

    Raises:
        InputError: a class has no image, or a feature is not finite.
    """
    total: torch.Tensor | None = None
    counts = torch.zeros(n_classes, dtype=torch.float64)
    for features, labels in batches:
        if not features.isfinite().all():
            raise InputError("prototypes: a feature of a real image is not finite: check the encoder and the images")
        if total is None:
            total = torch.zeros(n_classes, features.shape[1], dtype=torch.float64)
        total.index_add_(0, labels, features.double())
        counts += torch.bincount(labels, minlength=n_classes)
    if total is None or (counts == 0).any():
        raise InputError(f"prototypes: class {int((counts == 0).nonzero()[0])} has no training image")
    return (total / counts[:, None]).float()


def project(features: torch.Tensor, prototype_a: torch.Tensor, prototype_b: torch.Tensor) -> torch.Tensor:
    """Where a feature lies on the line from prototype b (0) to prototype a (1), not clipped (Luo et al. 2025, reannotation).

    ((f - p_b) . (p_a - p_b)) / ||p_a - p_b||^2, features not normalised.

    Args:
        features, prototype_a, prototype_b: (N, F).

    Returns:
        float (N,).

    Raises:
        InputError: the prototypes of a pair coincide.
    """
    line = prototype_a - prototype_b
    length = line.square().sum(dim=1)
    if (length == 0).any():
        raise InputError("projection: the prototypes of two classes coincide: the encoder does not tell them apart")
    return ((features - prototype_b) * line).sum(dim=1) / length
