"""What every head is and what it is fitted from. A head turns an encoder's features into what is stored of a mixed image."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from csm.encoders import FeatureTable
from csm.errors import InputError


@dataclass(frozen=True)
class FitInputs:
    """What a head may be fitted from.

    Attributes:
        features: of the real images by the head's encoder; split "train" to fit, "val" is held out for choices and calibration.
        n_classes: K.
        class_names: of the K classes.
        encoder: settings of the encoder, for heads that need more of the same model.
    """

    features: FeatureTable
    n_classes: int
    class_names: tuple[str, ...]
    encoder: Mapping[str, Any] = field(default_factory=dict)


class PosteriorHead(Protocol):
    """Knows all classes: features float32 (N, F) -> log-posterior float32 (N, K) before calibration."""

    def __call__(self, features: torch.Tensor) -> torch.Tensor: ...

    def to(self, device: torch.device) -> "PosteriorHead": ...


class PairHead(Protocol):
    """Knows only the pair."""

    def share(
        self, features: torch.Tensor | None, class_a: torch.Tensor, class_b: torch.Tensor, lam: torch.Tensor
    ) -> torch.Tensor:
        """Share of class a among the pair, unclipped, float32 (N,).

        ``features`` float32 (N, F), or None for a head without encoder; ``class_a``, ``class_b`` int64 (N,); ``lam`` float32 (N,).
        """
        ...

    def to(self, device: torch.device) -> "PairHead": ...


class HeadKind(NamedTuple):
    """How a head is made.

    Attributes:
        fit: ``fit(directory, inputs, **parameters)`` writes all that ``load`` needs; settings are its simple arguments
            (``csm.parameters``). It may return what it chose by itself, for people.
        load: ``load(directory)`` gives the head, on the CPU.
        pair: it is a ``PairHead``, else a ``PosteriorHead``.
        encoder: it reads features.
        encoders: kinds of encoder whose features it can read; empty: all.
    """

    fit: Callable[..., Mapping[str, float] | None]
    load: Callable[[Path], Any]
    pair: bool = False
    encoder: bool = True
    encoders: tuple[str, ...] = ()


def check_size(features: torch.Tensor, size: int, head: str) -> None:
    """``InputError`` unless ``features`` (N, F) have the F = ``size`` that ``head`` was fitted on."""
    if features.shape[1] != size:
        raise InputError(
            f"{head}: it was fitted on {size} numbers for each image, the encoder gives {features.shape[1]}: fit the annotators again"
        )
