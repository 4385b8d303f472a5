"""Plan rows in, images out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

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
from csm.training_images import TrainingImages, pixel_mixtures, real_images

GENERATED = ("semantic", "unmixed", "noised")  # kinds of images that a generator makes; the others are made of real ones alone
NOISED = "noised"


def mix(
    plan: pl.DataFrame,
    generator: Generator | None,
    shape: tuple[int, int, int],
    sampler: SamplerConfig,
    batch_size: int = 256,
    operator: str = "embedding",
    real: TrainingImages | None = None,
    strength: float = 1.0,
) -> pl.DataFrame:
    """The images of rows of one kind.

    "semantic" and "unmixed": every row's noise is denoised under its mixed condition (Luo et al. 2025, section on semantic mixing), which
    is that of one class for "unmixed". "noised": the same, but from a training image of the nearer class with noise of level ``strength``
    (SDEdit, Meng et al. 2022, Alg. 1). "pixel": see ``pixel_mixtures``. "real": training images as they are.

    Args:
        plan: rows of the `plan` table.
        generator: class-conditional model; None will do for kinds that are not ``GENERATED``.
        shape: (H, W, C) of the images; a generator of another size is fitted to it, see ``fit_to``.
        sampler: solver settings; noise levels are kept inside ``generator.sigma_range``.
        batch_size: rows that go through the network together; fewer where they do not fit the memory, see ``in_micro_batches``.
        operator: how two classes are mixed, see ``OPERATORS``.
        real: training images, for the kinds "pixel", "noised" and "real".
        strength: highest noise level of "noised", in place of that of ``sampler``; as many steps lie below it.

    Returns:
        The `mixed` table, one row for each plan row, in the same order.

    Raises:
        InputError: the operator cannot be used with this generator, or it gave pixels that are not finite, which as uint8 would pass for
            black.
        InputError: the memory of the device does not hold a single row, or kind "noised" cannot be made with this generator.
    """
    return start_mixing(plan, generator, shape, sampler, batch_size, operator, real, strength)()


def start_mixing(
    plan: pl.DataFrame,
    generator: Generator | None,
    shape: tuple[int, int, int],
    sampler: SamplerConfig,
    batch_size: int = 256,
    operator: str = "embedding",
    real: TrainingImages | None = None,
    strength: float = 1.0,
) -> Callable[[], pl.DataFrame]:
    """Start what ``mix`` does, with its arguments, and return a function that waits for the images and gives their table.

    A GPU may still be computing when this returns. The function may be called in another thread, while the next rows are started.
    """
    kinds = plan["kind"].unique().to_list()
    if len(kinds) != 1:
        raise ValueError(f"plan: expected rows of one kind, got {kinds}")
    if kinds[0] in _OF_REAL:
        made = tables.from_images(_OF_REAL[kinds[0]](plan, _given(real, "real", kinds[0])))
        return lambda: _table(plan, made)
    model = _given(generator, "generator", kinds[0])
    rows = plan
    if kinds[0] == NOISED:
        sampler = starting_at(strength, sampler, model, shape)
        images = _given(real, "real", NOISED)
        rows = plan.with_columns(tables.from_images(images.take(images.nearer(plan))))
    batches = list(in_micro_batches(rows, batch_size, lambda part: _mix_rows(part, model, shape, sampler, operator)))
    copied = _end_of_queue(model.device)
    return lambda: _table(plan, tables.from_images(_arrived(batches, copied)))


def starting_at(strength: float, sampler: SamplerConfig, generator: Generator, shape: tuple[int, int, int]) -> SamplerConfig:
    """``sampler`` from noise level ``strength`` on, where images of ``shape`` (H, W, C) with such noise are what ``generator`` denoises.

    Raises:
        InputError: ``strength`` is not between the lowest level and the generator's highest, or the generator denoises latent codes or
            images of another size.
    """
    height, width, channels = shape
    if generator.noise_shape != (channels, height, width):
        raise InputError(
            f"plan.kinds: noised needs a generator of the data's own pixels ({height} x {width} x {channels}), and the noise of this one "
            f"is {' x '.join(map(str, generator.noise_shape))} (channels first): leave noised out"
        )
    inside = within(sampler, generator.sigma_range)
    if not inside.sigma_min < strength <= generator.sigma_range[1]:
        raise InputError(
            f"mix.strength: expected a noise level above {inside.sigma_min:g} and up to {generator.sigma_range[1]:g}, which is what this "
            f"sampler and generator know, got {strength:g}"
        )
    return replace(inside, sigma_max=strength)


def sample(
    labels: Sequence[int], seeds: Sequence[int], generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig
) -> torch.Tensor:
    """Unmixed images uint8 (N, C, H, W) of classes ``labels`` (N,), row i from the noise of ``seeds[i]``."""
    condition = generator.embed(torch.tensor(labels, dtype=torch.int64, device=generator.device))
    return _arrived([_denoise(seeds, denoiser(generator, condition), generator, shape, sampler)], _end_of_queue(generator.device))


def evaluations_per_image(
    sampler: SamplerConfig, operator: str, ratios: Sequence[float], kind: str = "semantic", guidance: float = 1.0
) -> float:
    """Network evaluations for one image of ``kind`` under ``guidance``, on average over images of ``ratios``."""
    if kind not in GENERATED:
        return 0.0
    shares = torch.zeros(1) if kind == "unmixed" else torch.tensor(ratios)
    each = 1 if guidance == 1 else 2
    return each * sampling.evaluations(sampler) * evaluations(operator, shares).double().mean().item()


_OF_REAL: dict[str, Callable[[pl.DataFrame, TrainingImages], torch.Tensor]] = {"pixel": pixel_mixtures, "real": real_images}
T = TypeVar("T")


def _given(value: T | None, name: str, kind: str) -> T:
    if value is None:
        raise ValueError(f"{name}: images of kind {kind} need it, got None")
    return value


def _table(plan: pl.DataFrame, images: pl.Series) -> pl.DataFrame:
    return tables.check(plan.select("mix_id").with_columns(images), tables.MIXED, "mixed")


class _Batch(NamedTuple):
    """Images uint8 (N, C, H, W) on their way to the CPU, and whether all pixels that the generator gave were finite, Boolean ()."""

    images: torch.Tensor
    finite: torch.Tensor


def _mix_rows(
    plan: pl.DataFrame, generator: Generator, shape: tuple[int, int, int], sampler: SamplerConfig, operator: str
) -> _Batch:
    """The images of ``plan``, which go through the network together. With a column ``image`` mixing starts from those images."""
    class_a, class_b = (
        torch.tensor(plan[name].to_list(), dtype=torch.int64, device=generator.device) for name in ("class_a", "class_b")
    )
    lam = torch.tensor(plan["lam"].to_list(), dtype=torch.float32, device=generator.device)
    start = from_uint8(tables.to_images(plan["image"], shape)) if "image" in plan.columns else None
    denoise = OPERATORS[operator](generator, class_a, class_b, lam)
    return _denoise(plan["seed"].to_list(), denoise, generator, shape, sampler, start)


def _denoise(
    seeds: Sequence[int],
    denoise: Denoiser,
    generator: Generator,
    shape: tuple[int, int, int],
    sampler: SamplerConfig,
    start: torch.Tensor | None = None,
) -> _Batch:
    """Images from the noise of ``seeds`` (N,) by ``denoise``; with ``start`` float (N, C, H, W) from these with that noise."""
    noise = initial_noise(seeds, generator.noise_shape)
    if start is not None:
        noise = noise + start / sampler.sigma_max  # which solvers scale by the first level: start + sigma_max * noise
    noise = noise.to(generator.device)

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


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 0..255 to float images in [-1, 1], which ``to_uint8`` maps back."""
    return images.float() / 127.5 - 1
