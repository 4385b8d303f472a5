"""How fast images go through a network on this machine, found out within seconds; weights make no difference to that."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from csm.classifiers import ClassifierSpec, build_classifier
from csm.datasets import DatasetInfo, RealDataset
from csm.encoders import ENCODERS, Sources, encode
from csm.generators import load_generator
from csm.generators.acceleration import accelerate
from csm.generators.config import GeneratorConfig
from csm.generators.guidance import set_guidance
from csm.generators.importing import IMPORTERS, ImportOptions, detect
from csm.methods import Method
from csm.mixing import mix
from csm.optimization import OptimizerConfig
from csm.pairs import all_pairs
from csm.planning import PlanConfig, make_plan
from csm.precision import Precision
from csm.sampling import SamplerConfig
from csm.training import fit

CLASSES = 10  # of the pairs that are mixed to measure: more make no difference but to the length of the plan


@dataclass(frozen=True)
class Source:
    """What a measurement is made from; folders are on storage that the worker sees.

    Attributes:
        info: of the data set, ``data`` its folder.
        config: of the generator.
        made: folder of the generator, or None: one of the same size is made, or the model at ``config.path`` imported, for the moment.
    """

    info: DatasetInfo
    data: Path
    config: GeneratorConfig
    made: Path | None = None


def mixing_rate(
    source: Source,
    sampler: SamplerConfig,
    batch_size: int,
    operator: str,
    precision: Precision,
    device: str,
    seconds: float,
    guidance: float | None = None,
) -> float:
    """Images a second of ``csm.mixing.mix`` with the arguments of that name.

    For ``device`` and ``precision`` see ``accelerate``, for ``guidance`` ``set_guidance``; None: the generator's own.
    """
    pairs = all_pairs(min(CLASSES, source.info.n_classes))
    sets = -(-batch_size // (8 * len(pairs)))
    plan = make_plan(source.info.n_classes, "rate", "rate", PlanConfig(sets_per_pair=sets), pairs)
    with TemporaryDirectory(prefix="csm-rate-") as folder:
        generator = accelerate(load_generator(_generator(source, Path(folder))), device, precision)
        if guidance is not None:
            set_guidance(generator, guidance)
        shape = source.info.shape
        return images_per_second(
            lambda rows: mix(plan.head(rows), generator, shape, sampler, batch_size, operator), batch_size, seconds
        )


def fitting_rate(source: Source, device: str, seconds: float) -> float:
    """Images a second in the training of the generator of ``source``."""
    from csm.generators.fitting import fit_generator  # importing diffusers takes seconds; only who needs it pays

    info, config = source.info, source.config
    images, labels = _images(info, config.batch_size), torch.arange(config.batch_size) % info.n_classes

    def work(steps: int) -> object:
        return fit_generator(images, labels, info.n_classes, replace(config, steps=steps), device=torch.device(device))

    return config.batch_size * steps_per_second(work, seconds)


def training_rate(spec: ClassifierSpec, info: DatasetInfo, optimizer: OptimizerConfig, device: str, seconds: float) -> float:
    """Images a second in the training of a classifier by cross-entropy, without torch.compile."""
    short = replace(optimizer, epochs=1, schedule="constant", warmup=0, choose="last", compile=False, hold="auto")
    size = optimizer.batch_size
    images, labels = _images(info, size), torch.arange(size) % info.n_classes

    def work(steps: int) -> object:
        real = images.repeat(steps, 1, 1, 1), labels.repeat(steps)
        return fit(build_classifier(spec), real, real, Method(), short, 0, device=torch.device(device))

    return size * steps_per_second(work, seconds)


def encoding_rate(
    source: Source, kind: str, parameters: Mapping[str, Any], member: ClassifierSpec, members: int, device: str, seconds: float
) -> float:
    """Images a second through the encoder ``kind`` of ``ENCODERS``; ``members`` classifiers like ``member`` are its teacher."""
    encoder, images = ENCODERS[kind], _images(source.info, 512)
    with TemporaryDirectory(prefix="csm-rate-") as folder:
        root = Path(folder)
        folders = [root / f"{number}" for number in range(members if "members" in encoder.needs else 0)]
        for directory in folders:
            build_classifier(member).save(directory)
        generator = _generator(source, root / "generator") if "generator" in encoder.needs else None
        sources = Sources(root / "fitted", tuple(folders), generator, source.data / "truth")
        if encoder.fit:
            encoder.fit(sources, lambda: [images], **parameters)
        loaded = encoder.load(sources, **parameters).to(torch.device(device))
        return images_per_second(lambda rows: encode(loaded, images[:rows], device), len(images), seconds)


def images_per_second(work: Callable[[int], object], most: int, seconds: float) -> float:
    """Images a second of ``work``, called with a number of images up to ``most``.

    It is given more and more until a call takes a quarter of ``seconds``, and then called until they are over; a single image that takes
    longer is measured twice.
    """
    _timed(work, 1)  # what is only done once: choosing kernels, reading files
    images = 1
    while (took := _timed(work, images)) < seconds / 4 and images < most:
        images = min(most, 2 * images)
    done, spent = (images, took) if took >= seconds else (0, 0.0)
    while spent < seconds:
        spent += _timed(work, images)
        done += images
    return done / spent


def steps_per_second(work: Callable[[int], object], seconds: float) -> float:
    """Steps a second of ``work``, called with a number of steps; what a call costs beside its steps is not counted."""
    _timed(work, 1)
    one, steps = _timed(work, 1), 2
    while (took := _timed(work, steps) - one) < seconds / 2:
        steps *= 2
    return (steps - 1) / took


def _timed(work: Callable[[int], object], amount: int) -> float:
    """Seconds that ``work(amount)`` takes, until the device has finished it."""
    started = time.monotonic()
    work(amount)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started


def _images(info: DatasetInfo, count: int) -> torch.Tensor:
    """Noise uint8 (N, C, H, W) in the shape of the data set's images."""
    height, width, channels = info.shape
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


def _generator(source: Source, folder: Path) -> Path:
    """Folder of a generator as ``source`` asks for, made in ``folder`` if there is none."""
    info, config = source.info, source.config
    if source.made is not None:
        return source.made
    if config.path:
        options = ImportOptions(info.class_names, config.classes, config.guidance, config.prompt)
        IMPORTERS[detect(Path(config.path)) if config.kind == "auto" else config.kind](Path(config.path), folder, options)
    elif config.kind == "truth":
        return source.data / "truth"
    elif config.kind == "gaussians":
        from csm.generators.gaussians import fit_gaussians

        fit_gaussians(*RealDataset.load(source.data).split("train"), info.n_classes).save(folder)
    else:
        from csm.generators.unet import UNetGenerator, UNetSpec

        sizes = (config.block_channels, config.layers_per_block, config.dropout, config.attention_levels, config.label_dropout)
        UNetGenerator(UNetSpec(info.shape, info.n_classes, 0.5, *sizes)).save(folder)
    return folder
