"""Encoders: frozen models that turn images into numbers. By name; each image goes through each of them once."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import polars as pl
import torch

from csm import tables
from csm.encoders.classifier import load_penultimate, load_teacher
from csm.encoders.clip import check_clip, load_clip
from csm.encoders.dinov2 import check_dinov2, load_dinov2
from csm.encoders.features import FeatureTable
from csm.encoders.generative import load_generator_posterior, load_shortlist_posterior, load_true_posterior
from csm.encoders.pca import fit_pca, load_pca
from csm.encoders.pixels import load_pixels
from csm.encoders.sources import Sources
from csm.errors import InputError

BATCH = 512  # images that go through an encoder together


class Encoder(Protocol):
    """Images uint8 (N, C, H, W) -> features float32 (N, F), on the device of both; a row's features depend on that image alone."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...

    def to(self, device: torch.device) -> "Encoder": ...


class EncoderKind(NamedTuple):
    """How an encoder is made.

    Attributes:
        load: ``load(sources, **parameters)``, its settings are the simple arguments (``csm.parameters``).
        fit: ``fit(sources, batches, **parameters)`` comes first and writes to ``sources.fitted``; ``batches()`` iterates over the
            training images uint8 (N, C, H, W), anew with each call. None if there is nothing to fit. Same settings as ``load``.
        needs: fields of ``Sources`` that it reads.
        check: ``check(**parameters)`` raises ``InputError`` for settings that can be seen to be wrong without loading anything.
    """

    load: Callable[..., Encoder]
    fit: Callable[..., None] | None = None
    needs: tuple[str, ...] = ()
    check: Callable[..., None] | None = None


ENCODERS: dict[str, EncoderKind] = {
    "pixels": EncoderKind(load_pixels),
    "pca": EncoderKind(load_pca, fit_pca),
    "classifier": EncoderKind(load_penultimate, needs=("members",)),
    "teacher": EncoderKind(load_teacher, needs=("members",)),
    "clip": EncoderKind(load_clip, check=check_clip),
    "dinov2": EncoderKind(load_dinov2, check=check_dinov2),
    "generator": EncoderKind(load_generator_posterior, needs=("generator",)),
    "shortlist": EncoderKind(load_shortlist_posterior, needs=("generator", "members")),
    "truth": EncoderKind(load_true_posterior, needs=("truth",)),
}


@torch.no_grad()
def encode(encoder: Encoder, images: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """Features float32 (N, F), on ``device`` like ``encoder``, of images uint8 (N, C, H, W), in batches.

    Raises:
        InputError: a feature is not finite.
    """
    features = torch.cat([encoder(batch.to(device)).float() for batch in images.split(BATCH)])
    if not features.isfinite().all():
        row = int((~features.isfinite().all(dim=1)).nonzero()[0])
        raise InputError(f"the feature of image {row} of {len(images)} is not finite: check the encoder's weights")
    return features


def encode_table(encoder: Encoder, real: pl.DataFrame, shape: tuple[int, int, int], device: str = "cpu") -> pl.DataFrame:
    """The `features` table of rows of the `real` table; ``shape`` is (H, W, C)."""
    features = encode(encoder, tables.to_images(real["image"], shape), device).cpu()
    schema = tables.features(features.shape[1])
    column = pl.Series("feature", features.numpy(), dtype=schema["feature"])
    return tables.check(real.select("image_id", "split", "label").with_columns(column), schema, "features")


__all__ = ["ENCODERS", "Encoder", "EncoderKind", "FeatureTable", "Sources", "encode", "encode_table"]
