"""Plan rows in, mixed images out."""

from collections.abc import Iterator, Sequence

import polars as pl
import torch

from csm import tables
from csm.generators import Generator
from csm.generators.conditioning import mix_embeddings
from csm.noise import initial_noise
from csm.sampling import SamplerConfig, solve


def mix(
    plan: pl.DataFrame,
    generator: Generator,
    shape: tuple[int, int, int],
    sampler: SamplerConfig,
    batch_size: int = 256,
) -> pl.DataFrame:
    """Denoise every row's noise under its mixed condition (Luo et al. 2025, section on semantic mixing).

    Args:
        plan: rows of the `plan` table.
        generator: class-conditional model.
        shape: (H, W, C) of the images.
        sampler: solver settings.
        batch_size: rows that go through the network together.

    Returns:
        The `mixed` table, one row for each plan row, in the same order.

    Raises:
        FloatingPointError: the generator gave pixels that are not finite, which as uint8 would pass for black.
    """
    images = torch.cat(list(_batches(plan, generator, shape, sampler, batch_size)))
    return tables.check(plan.select("mix_id").with_columns(tables.from_images(images)), tables.MIXED, "mixed")


def sample(
    labels: Sequence[int], seeds: Sequence[int], generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> torch.Tensor:
    """Unmixed images uint8 (N, C, H, W) of classes ``labels`` (N,), row i from the noise of ``seeds[i]``."""
    condition = generator.embed(torch.tensor(labels, dtype=torch.int64, device=generator.device))
    return _denoise(seeds, condition, generator, shape, sampler)


def _batches(
    plan: pl.DataFrame, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig, batch_size: int
) -> Iterator[torch.Tensor]:
    for rows in plan.iter_slices(batch_size):
        class_a, class_b = (
            generator.embed(torch.tensor(rows[name].to_list(), dtype=torch.int64, device=generator.device))
            for name in ("class_a", "class_b")
        )
        lam = torch.tensor(rows["lam"].to_list(), dtype=torch.float32, device=generator.device)
        yield _denoise(rows["seed"].to_list(), mix_embeddings(class_a, class_b, lam), generator, shape, sampler)


def _denoise(
    seeds: Sequence[int], condition: torch.Tensor, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> torch.Tensor:
    """uint8 (N, C, H, W) from the noise of ``seeds`` under ``condition`` (N, E)."""
    height, width, channels = shape
    noise = initial_noise(seeds, (channels, height, width)).to(generator.device)
    images = solve(lambda x, sigma: generator.denoise(x, sigma, condition), noise, sampler)
    if not images.isfinite().all():
        raise FloatingPointError("mixing: the generator gave pixels that are not finite: fit it again or import another one")
    return to_uint8(images)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map float images in [-1, 1] (clipped) to uint8 0..255, on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
