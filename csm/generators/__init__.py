"""Generators: whatever the model, it becomes ``embed(labels)``, ``denoise(x, sigma, condition)`` and ``decode(x)``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.locations import local


class Generator(Protocol):
    """What mixing needs of a generative model.

    Attributes:
        device: where it computes.
        network: all that is evaluated at each noise level, in the dtype of its weights (``csm.generators.acceleration``); ``denoise``
            takes and gives float32 whatever that is. None where there is no network.
        n_classes: classes that ``embed`` takes: those of the data set, 0..n_classes-1.
        noise_shape: (C, H, W) of the noise that it starts from: of pixels, or of a latent code.
        sigma_range: lowest and highest noise level that it was trained on; solvers stay inside.
        spherical: whether its condition is a vector of an embedding space, in which directions mean something; False for weights of
            classes and other numbers of which only linear mixtures do.
        guides: whether it has a condition of no class, from which ``guidance`` leads away.
        guidance: scale of classifier-free guidance that ``denoise`` applies; 1 is none (``csm.generators.guidance``).
    """

    guidance: float

    @property
    def device(self) -> torch.device: ...
    @property
    def network(self) -> nn.Module | None: ...
    @property
    def n_classes(self) -> int: ...
    @property
    def noise_shape(self) -> tuple[int, int, int]: ...
    @property
    def sigma_range(self) -> tuple[float, float]: ...
    @property
    def spherical(self) -> bool: ...
    @property
    def guides(self) -> bool: ...

    def to(self, device: torch.device) -> Any:
        """Move to ``device``, in place."""
        ...

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """Conditions (N, ...) of labels int64 (N,); the condition of a mixture of classes is a mixture of these."""
        ...

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """E[clean | x, condition] float32 (N, C, H, W), from x = clean + sigma * noise float32 (N, C, H, W), sigma float32 (N,).

        Under a ``guidance`` other than 1 it is no such mean, but what samples are made of.
        """
        ...

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images float32 (N, channels, height, width), nominally in [-1, 1], from what ``denoise`` gives; pixel models return it."""
        ...


class ExactGenerator(Generator, Protocol):
    """A generator whose images have a known law."""

    def sample(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Exact draws float32 (N, C, H, W) of classes ``labels`` (N,), row i from ``seeds[i]``; no pixel is clipped."""
        ...

    def log_posterior(self, x: torch.Tensor) -> torch.Tensor:
        """log p(y | x) float64 (N, K) of images (N, C, H, W) without noise."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its parameters."""
        ...

    def save(self, directory: Path) -> None:
        """Write what ``load_generator`` reads, ``model.safetensors`` and then ``generator.json``."""
        ...


def _load_unet(directory: Path) -> Generator:
    from csm.generators.unet import load_unet  # importing diffusers takes seconds; only who needs it pays

    return load_unet(directory)


def _load_diffusers_unet(directory: Path) -> Generator:
    from csm.generators.diffusers_unet import load_diffusers_unet

    return load_diffusers_unet(directory)


def _load_dit(directory: Path) -> Generator:
    from csm.generators.dit import load_dit

    return load_dit(directory)


def _load_stable_diffusion(directory: Path) -> Generator:
    from csm.generators.stable_diffusion import load_stable_diffusion

    return load_stable_diffusion(directory)


def _load_edm(directory: Path) -> Generator:
    from csm.generators.edm.generator import load_edm

    return load_edm(directory)


def _load_gaussians(directory: Path) -> Generator:
    from csm.generators.gaussians import load_gaussians

    return load_gaussians(directory)


def _load_gaussian_mixtures(directory: Path) -> Generator:
    from csm.generators.gaussian_mixtures import load_gaussian_mixtures

    return load_gaussian_mixtures(directory)


GENERATORS: dict[str, Callable[[Path], Generator]] = {
    "unet": _load_unet,
    "diffusers-unet": _load_diffusers_unet,
    "dit": _load_dit,
    "stable-diffusion": _load_stable_diffusion,
    "edm": _load_edm,
    "gaussians": _load_gaussians,
    "gaussian-mixtures": _load_gaussian_mixtures,
}


def load_generator(directory: Path) -> Generator:
    """Return the generator saved in ``directory`` (``generator.json`` says which kind it is)."""
    value = storage.read_json(directory / "generator.json")
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in GENERATORS:
        raise InputError(f"{directory / 'generator.json'}: unknown kind {kind!r}; one of {', '.join(GENERATORS)}")
    return GENERATORS[kind](local(directory))


def load_truth(directory: Path) -> ExactGenerator | None:
    """Return the generator saved in ``directory``, the law of a data set's images; None if there is no such folder.

    Raises:
        InputError: its law is not known.
    """
    if not directory.is_dir():
        return None
    generator = load_generator(directory)
    if not is_exact(generator):
        raise InputError(f"{directory} holds no generator whose posterior is known: run `csm prepare --force prepare`")
    return generator


def is_exact(generator: Generator) -> TypeGuard[ExactGenerator]:
    """Whether the law of the images of ``generator`` is known in closed form."""
    return hasattr(generator, "log_posterior")


__all__ = ["GENERATORS", "ExactGenerator", "Generator", "is_exact", "load_generator", "load_truth"]
