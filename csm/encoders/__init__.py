"""Encoders: images uint8 (N, C, H, W) -> features float32 (N, F), frozen."""

from collections.abc import Callable
from pathlib import Path

import torch

from csm.classifiers import load_classifier

Encoder = Callable[[torch.Tensor], torch.Tensor]


def classifier_features(directory: Path) -> Encoder:
    """The penultimate layer of the classifier saved in ``directory``."""
    return load_classifier(directory).features


ENCODERS: dict[str, Callable[[Path], Encoder]] = {"classifier": classifier_features}

__all__ = ["ENCODERS", "Encoder", "classifier_features"]
