"""Losses by name. ``HARD`` are for real images, ``SOFT`` for mixed images; built, all are ``loss(logits (N, K), target (N, K))``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from csm.errors import InputError
from csm.losses.calibration import mdca, mmce
from csm.losses.focal import AdaFocal, dual_focal, flsd_53, focal
from csm.losses.hard import brier, cross_entropy, entropy_penalty, label_smoothing
from csm.losses.loss import FunctionLoss, Loss
from csm.losses.margins import acls, cpc, mbls
from csm.losses.soft import kl, l1, l2
from csm.parameters import check_parameters

HARD: dict[str, Callable[..., torch.Tensor] | type[Loss]] = {
    "cross-entropy": cross_entropy,
    "label-smoothing": label_smoothing,
    "focal": focal,
    "flsd-53": flsd_53,
    "adafocal": AdaFocal,
    "dual-focal": dual_focal,
    "brier": brier,
    "mmce": mmce,
    "mdca": mdca,
    "mbls": mbls,
    "cpc": cpc,
    "entropy-penalty": entropy_penalty,
    "acls": acls,
}
SOFT: dict[str, Callable[..., torch.Tensor] | type[Loss]] = {
    "cross-entropy": cross_entropy,
    "kl": kl,
    "l1": l1,
    "l2": l2,
    "brier": brier,
}


def build_loss(
    registry: Mapping[str, Callable[..., torch.Tensor] | type[Loss]], name: str, parameters: Mapping[str, Any], where: str
) -> Loss:
    """Return ``registry[name]`` with its parameters bound; ``InputError`` (naming the key ``where``) if it cannot be."""
    if name not in registry:
        raise InputError(f"{where}: unknown loss {name!r}; one of {', '.join(registry)}")
    entry = registry[name]
    checked = check_parameters(entry, parameters, where)
    loss: Loss = entry(**checked) if isinstance(entry, type) else FunctionLoss(entry, checked)
    return loss


__all__ = ["HARD", "SOFT", "Loss", "build_loss"]
