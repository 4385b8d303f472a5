"""Generators: whatever the model, it becomes ``embed(labels)`` and ``denoise(x, sigma, condition)``."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from csm import storage
from csm.errors import InputError


class Generator(Protocol):
    """What mixing needs of a generative model. Images are in [-1, 1]."""

    @property
    def device(self) -> torch.device: ...

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """Condition vectors (N, E) of labels int64 (N,)."""
        ...

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Clean images (N, C, H, W) from x (N, C, H, W), sigma (N,) and condition (N, E)."""
        ...


def _load_unet(directory: Path) -> Generator:
    from csm.generators.unet import load_unet  # importing diffusers takes seconds; only who needs it pays

    return load_unet(directory)


GENERATORS: dict[str, Callable[[Path], Generator]] = {"unet": _load_unet}


def load_generator(directory: Path) -> Generator:
    """Return the generator saved in ``directory`` (``generator.json`` says which kind it is)."""
    value = storage.read_json(directory / "generator.json")
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in GENERATORS:
        raise InputError(f"{directory / 'generator.json'}: unknown kind {kind!r}; one of {', '.join(GENERATORS)}")
    return GENERATORS[kind](directory)


__all__ = ["GENERATORS", "Generator", "load_generator"]
