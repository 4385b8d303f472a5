"""A trained generator, for what random weights cannot show."""

from pathlib import Path

from csm.datasets.digits import digits_hard
from csm.generators import Generator, load_generator
from csm.generators.config import GeneratorConfig
from csm.generators.guidance import set_guidance
from flows.config import load_config
from flows.progress import task

DEMO = GeneratorConfig(block_channels=(16, 32), steps=600)


def trained_generator(workspace: Path | None) -> Generator:
    """That of ``workspace``, guided as its images are; without one, a UNet of the demo's settings, trained here (about a minute)."""
    if workspace:
        generator, config = load_generator(workspace / "generator"), workspace / "config.yaml"
        if config.is_file():
            set_guidance(generator, load_config(str(config)).guidance)
        return generator
    from csm.generators.fitting import fit_generator  # importing diffusers takes seconds; only who needs it pays

    data = digits_hard()
    with task("fit-generator", DEMO.steps) as progress:
        generator = fit_generator(*data.split("train"), data.info.n_classes, DEMO, on_step=lambda step, loss: progress.advance())
    return generator.requires_grad_(False)
