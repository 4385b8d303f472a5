"""A trained generator, for what random weights cannot show."""

from pathlib import Path

from csm.datasets.digits import digits_hard
from csm.generators import Generator, load_generator
from csm.generators.config import GeneratorConfig
from flows.progress import task

DEMO = GeneratorConfig(block_channels=(16, 32), steps=600)


def trained_generator(workspace: Path | None) -> Generator:
    """That of ``workspace``; without one, a UNet of the demo's settings, trained here on ``digits-hard`` (about a minute)."""
    if workspace:
        return load_generator(workspace / "generator")
    from csm.generators.fitting import fit_generator  # importing diffusers takes seconds; only who needs it pays

    data = digits_hard()
    with task("fit-generator", DEMO.steps) as progress:
        generator = fit_generator(*data.split("train"), data.info.n_classes, DEMO, on_step=lambda step, loss: progress.advance())
    return generator.requires_grad_(False)
