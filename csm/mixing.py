"""Plan rows in, mixed images out."""

from collections.abc import Iterator, Sequence

import polars as pl
import torch
import torch.nn.functional as F

from csm import sampling, tables
from csm.generators import Generator
from csm.generators.conditioning import OPERATORS, denoiser, evaluations
from csm.noise import fresh_noise, initial_noise
from csm.sampling import Denoiser, SamplerConfig, solve, within


def mix(
    plan: pl.DataFrame,
    generator: Generator,
    shape: tuple[int, int, int],
    sampler: SamplerConfig,
    batch_size: int = 256,
    operator: str = "embedding",
) -> pl.DataFrame:
    """Denoise every row's noise under its mixed condition (Luo et al. 2025, section on semantic mixing).

    Args:
        plan: rows of the `plan` table.
        generator: class-conditional model.
        shape: (H, W, C) of the images; a generator of another size is fitted to it, see ``fit_to``.
        sampler: solver settings; noise levels are kept inside ``generator.sigma_range``.
        batch_size: rows that go through the network together.
        operator: how two classes are mixed, see ``OPERATORS``.

    Returns:
        The `mixed` table, one row for each plan row, in the same order.

    Raises:
        InputError: the operator cannot be used with this generator.
        FloatingPointError: the generator gave pixels that are not finite, which as uint8 would pass for black.
    """
    images = torch.cat(list(_batches(plan, generator, shape, sampler, batch_size, operator)))
    return tables.check(plan.select("mix_id").with_columns(tables.from_images(images)), tables.MIXED, "mixed")


def sample(
    labels: Sequence[int], seeds: Sequence[int], generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> torch.Tensor:
    """Unmixed images uint8 (N, C, H, W) of classes ``labels`` (N,), row i from the noise of ``seeds[i]``."""
    condition = generator.embed(torch.tensor(labels, dtype=torch.int64, device=generator.device))
    return _denoise(seeds, denoiser(generator, condition), generator, shape, sampler)


def evaluations_per_image(sampler: SamplerConfig, operator: str, ratios: Sequence[float]) -> float:
    """Network evaluations for one image, on average over images of ``ratios``."""
    return sampling.evaluations(sampler) * evaluations(operator, torch.tensor(ratios)).double().mean().item()


def _batches(
    plan: pl.DataFrame, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig, batch_size: int, operator: str
) -> Iterator[torch.Tensor]:
    for rows in plan.iter_slices(batch_size):
        class_a, class_b = (
            torch.tensor(rows[name].to_list(), dtype=torch.int64, device=generator.device) for name in ("class_a", "class_b")
        )
        lam = torch.tensor(rows["lam"].to_list(), dtype=torch.float32, device=generator.device)
        denoise = OPERATORS[operator](generator, class_a, class_b, lam)
        yield _denoise(rows["seed"].to_list(), denoise, generator, shape, sampler)


def _denoise(
    seeds: Sequence[int], denoise: Denoiser, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> torch.Tensor:
    """uint8 (N, C, H, W) from the noise of ``seeds`` (N,) by ``denoise``."""
    noise = initial_noise(seeds, generator.noise_shape).to(generator.device)
    inside = within(sampler, generator.sigma_range)

    def fresh(step: int) -> torch.Tensor:
        return fresh_noise(seeds, generator.noise_shape, step).to(generator.device)

    images = generator.decode(solve(denoise, noise, inside, fresh))
    if not images.isfinite().all():
        raise FloatingPointError("mixing: the generator gave pixels that are not finite: fit it again or import another one")
    return to_uint8(fit_to(images, shape))


def fit_to(images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Float images (N, C, H, W) in the size and channels of the data set's ``shape`` (H, W, C), for a generator that makes others.

    Resized by antialiased bicubic interpolation, as the images of a folder are; grey is ITU-R BT.601 luma, colour repeats grey.

    Raises:
        ValueError: neither 1 nor 3 channels become the other.
    """
    height, width, channels = shape
    if images.shape[1] != channels:
        if {images.shape[1], channels} != {1, 3}:
            raise ValueError(f"images of {images.shape[1]} channels cannot become images of {channels}")
        luma = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = (images * luma).sum(dim=1, keepdim=True) if channels == 1 else images.expand(-1, 3, -1, -1)
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, size=(height, width), mode="bicubic", antialias=True)
    return images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map float images in [-1, 1] (clipped) to uint8 0..255, on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
