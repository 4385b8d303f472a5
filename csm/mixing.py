"""Plan rows in, mixed images out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import polars as pl
import torch
import torch.nn.functional as F

from csm import sampling, tables
from csm.errors import InputError
from csm.generators import Generator
from csm.generators.conditioning import OPERATORS, denoiser, evaluations
from csm.micro_batches import in_micro_batches
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
        batch_size: rows that go through the network together; fewer where they do not fit the memory, see ``in_micro_batches``.
        operator: how two classes are mixed, see ``OPERATORS``.

    Returns:
        The `mixed` table, one row for each plan row, in the same order.

    Raises:
        InputError: the operator cannot be used with this generator, or it gave pixels that are not finite, which as uint8 would pass for
            black.
        InputError: the memory of the device does not hold a single row.
    """
    return start_mixing(plan, generator, shape, sampler, batch_size, operator)()


def start_mixing(
    plan: pl.DataFrame,
    generator: Generator,
    shape: tuple[int, int, int],
    sampler: SamplerConfig,
    batch_size: int = 256,
    operator: str = "embedding",
) -> Callable[[], pl.DataFrame]:
    """Start what ``mix`` does, with its arguments, and return a function that waits for the images and gives their table.

    A GPU may still be computing when this returns. The function may be called in another thread, while the next rows are started.
    """
    batches = list(in_micro_batches(plan, batch_size, lambda rows: _mix_rows(rows, generator, shape, sampler, operator)))
    copied = _end_of_queue(generator.device)

    def finish() -> pl.DataFrame:
        images = _arrived(batches, copied)
        return tables.check(plan.select("mix_id").with_columns(tables.from_images(images)), tables.MIXED, "mixed")

    return finish


def sample(
    labels: Sequence[int], seeds: Sequence[int], generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> torch.Tensor:
    """Unmixed images uint8 (N, C, H, W) of classes ``labels`` (N,), row i from the noise of ``seeds[i]``."""
    condition = generator.embed(torch.tensor(labels, dtype=torch.int64, device=generator.device))
    return _arrived([_denoise(seeds, denoiser(generator, condition), generator, shape, sampler)], _end_of_queue(generator.device))


def evaluations_per_image(sampler: SamplerConfig, operator: str, ratios: Sequence[float]) -> float:
    """Network evaluations for one image, on average over images of ``ratios``."""
    return sampling.evaluations(sampler) * evaluations(operator, torch.tensor(ratios)).double().mean().item()


class _Batch(NamedTuple):
    """Images uint8 (N, C, H, W) on their way to the CPU, and whether all pixels that the generator gave were finite, Boolean ()."""

    images: torch.Tensor
    finite: torch.Tensor


def _mix_rows(
    plan: pl.DataFrame, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig, operator: str
) -> _Batch:
    """The images of ``plan``, which go through the network together."""
    class_a, class_b = (
        torch.tensor(plan[name].to_list(), dtype=torch.int64, device=generator.device) for name in ("class_a", "class_b")
    )
    lam = torch.tensor(plan["lam"].to_list(), dtype=torch.float32, device=generator.device)
    return _denoise(plan["seed"].to_list(), OPERATORS[operator](generator, class_a, class_b, lam), generator, shape, sampler)


def _denoise(
    seeds: Sequence[int], denoise: Denoiser, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> _Batch:
    """Images from the noise of ``seeds`` (N,) by ``denoise``."""
    noise = initial_noise(seeds, generator.noise_shape).to(generator.device)

    def fresh(step: int) -> torch.Tensor:
        return fresh_noise(seeds, generator.noise_shape, step).to(generator.device)

    images = generator.decode(solve(denoise, noise, within(sampler, generator.sigma_range), fresh))
    # A question to the GPU would wait for it; the copies go into pinned memory while it works on.
    return _Batch(*(part.to("cpu", non_blocking=True) for part in (to_uint8(fit_to(images, shape)), images.isfinite().all())))


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """What a GPU reaches when it has done all that it was given so far; None where nothing is left to wait for."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _arrived(batches: Sequence[_Batch], copied: torch.cuda.Event | None) -> torch.Tensor:
    """Images uint8 (N, C, H, W) of ``batches`` once the event ``copied`` was reached; raises as ``mix`` does."""
    if copied is not None:
        copied.synchronize()
    if not all(batch.finite for batch in batches):
        raise InputError("mixing: the generator gave pixels that are not finite: fit it again or import another one")
    return torch.cat([batch.images for batch in batches])


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
    """Map float images in [-1, 1] (clipped) to uint8 0..255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
