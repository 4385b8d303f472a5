"""fit-generator: train the class-conditional diffusion model on the train split."""

import numpy as np

from cluster.resources import Group
from csm import storage
from csm.datasets import RealDataset
from csm.generators import load_generator
from csm.generators.gaussians import fit_gaussians
from csm.mixing import sample
from csm.plots import image_grid
from csm.sampling import SamplerConfig
from flows.artifacts import StageRecord
from flows.losses import tell_delay, tell_loss
from flows.progress import task
from flows.stages import Context, Made

LOG_STEPS = 10  # optimiser steps whose mean loss is one point of the curve
SAMPLES = 8  # pictures of each class in the sample grid
SAMPLER = SamplerConfig(solver="heun", spacing="karras", steps=18, sigma_min=0.002)  # EDM's for CIFAR-10, whatever mixing uses


def fit(context: Context, record: StageRecord) -> list[float]:
    """Train the generator into the workspace, going on from ``state.pt`` there, and return the loss of every step.

    Gaussians are fitted, and the truth is copied, in no step. One worker without a GPU on this machine is this process, with all its
    cores: Ray would add seconds to a short training. Everything else is a Ray Train group of ``resources.fit``.
    """
    kind = context.config.generator.kind
    if kind in ("gaussians", "truth"):
        data = RealDataset.load(context.workspace.root)
        generator = data.truth if kind == "truth" else fit_gaussians(*data.split("train"), data.info.n_classes)
        generator.save(context.workspace.generator)
        return []
    from csm.generators.fitting import FitJob, fit_job  # importing diffusers takes seconds; only who needs it pays

    workspace, group = context.workspace, context.config.resources.fit
    job = FitJob(workspace.root.absolute(), workspace.generator.absolute(), context.config.generator, record.fingerprint)
    losses: list[float] = []
    with task("fit-generator", job.config.steps) as progress:

        def on_step(step: int, loss: float) -> None:
            losses[step - 1 :] = [loss]  # a group that had to start again tells its steps again
            progress.advance(step - progress.done, f"loss {np.mean(losses[-100:]):.3f}")

        if context.address == "local" and _is_one_process(group):
            fit_job(job, on_step)
        else:
            from cluster.fitting import fit_in_group
            from cluster.groups import Delay, Setback

            def on_loss(loss: Setback | Delay) -> None:
                if isinstance(loss, Delay):
                    tell_delay(context, record.name, f"goes on from step {loss.step}", loss.repeated, loss.late)
                else:
                    tell_loss(context, record.name, loss.reason, loss.workers)

            context.connect()
            fit_in_group(job, group, workspace.root / "ray", record.name, on_step, on_loss)
    return losses


def _is_one_process(group: Group) -> bool:
    return group.workers == 1 and group.gpus == 0


def fit_generator(context: Context, record: StageRecord) -> Made:
    """Train, then log the loss curve and a grid of samples."""
    directory = context.workspace.generator
    losses = fit(context, record)
    key = f"stage {record.name} {record.fingerprint}"
    means = [
        (step, {"loss": float(np.mean(losses[step - LOG_STEPS : step]))}) for step in range(LOG_STEPS, len(losses) + 1, LOG_STEPS)
    ]
    context.tracker.log_steps(key, means)
    info = RealDataset.load_info(context.workspace.root)
    classes = np.repeat(np.arange(info.n_classes), SAMPLES).tolist()
    generator = load_generator(directory)
    samples = sample(classes, list(range(len(classes))), generator, info.shape, SAMPLER)
    storage.write_tensors(directory / "samples.safetensors", {"images": samples})
    grid = samples.permute(0, 2, 3, 1).reshape(info.n_classes, SAMPLES, *info.shape).numpy()
    context.tracker.log_figure(key, image_grid(grid, row_labels=info.class_names), "samples.png")
    (directory / "state.pt").unlink(missing_ok=True)
    weights = storage.read_tensors(directory / "model.safetensors").values()
    return Made(sum(weight.numel() for weight in weights), storage.file_digest(directory / "model.safetensors"))


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
