"""Class prototypes: the mean feature of each class's real images."""

import torch

from csm.errors import InputError
from csm.reannotation.moments import Batches, class_means


def class_prototypes(batches: Batches, n_classes: int) -> torch.Tensor:
    """Mean feature of each class, float32 (K, F), as a running sum in float64 over batches (features (N, F), labels int64 (N,)).

    Raises:
        InputError: a class has no image, or a feature is not finite.
    """
    return class_means(batches, n_classes, "prototypes")[1].float()


def check_distinct(prototypes: torch.Tensor) -> None:
    """Raise ``InputError`` if two of the ``prototypes`` (K, F) coincide: there is no line between them to project on."""
    for label, prototype in enumerate(prototypes):
        same = (_squared_length(prototypes[label + 1 :] - prototype) == 0).nonzero()
        if len(same):
            raise InputError(
                f"projection: the prototypes of classes {label} and {label + 1 + int(same[0])} coincide: the encoder does not tell "
                "them apart, take another one"
            )


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
    length = _squared_length(line)
    if (length == 0).any():
        raise InputError("projection: the prototypes of two classes coincide: the encoder does not tell them apart")
    return ((features - prototype_b) * line).sum(dim=1) / length


def _squared_length(lines: torch.Tensor) -> torch.Tensor:
    return lines.square().sum(dim=1)
