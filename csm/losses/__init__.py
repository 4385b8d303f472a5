"""Losses by name. ``HARD`` are for real images, ``SOFT`` for mixed images; all are ``loss(logits (N, K), target (N, K))``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from csm.errors import InputError
from csm.losses.hard import cross_entropy, focal, label_smoothing
from csm.losses.soft import kl, l1, l2, soft_cross_entropy
from csm.parameters import check_parameters

HARD: dict[str, Callable[..., torch.Tensor]] = {
    "cross-entropy": cross_entropy,
    "label-smoothing": label_smoothing,
    "focal": focal,
}
SOFT: dict[str, Callable[..., torch.Tensor]] = {
    "cross-entropy": soft_cross_entropy,
    "kl": kl,
    "l1": l1,
    "l2": l2,
}


def build_loss(
    registry: dict[str, Callable[..., torch.Tensor]], name: str, parameters: dict[str, Any], where: str
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return ``registry[name]`` with its parameters bound; ``InputError`` (naming the key ``where``) if it cannot be."""
    if name not in registry:
        raise InputError(f"{where}: unknown loss {name!r}; one of {', '.join(registry)}")
    return partial(registry[name], **check_parameters(registry[name], parameters, where))


__all__ = ["HARD", "SOFT", "build_loss"]
