"""fit-generator: train the class-conditional diffusion model on the train split."""

from dataclasses import asdict
from typing import Any

import numpy as np

from csm import storage
from csm.datasets import RealDataset
from csm.mixing import sample
from csm.plots import image_grid
from csm.sampling import SamplerConfig
from flows.artifacts import StageRecord
from flows.progress import task
from flows.stages import Context, Made, Stage

LOG_STEPS = 10  # optimiser steps whose mean loss is one point of the curve
SAMPLES = 8  # pictures of each class in the sample grid
SAMPLER = SamplerConfig(solver="heun", spacing="karras", steps=18, sigma_min=0.002)  # EDM's for CIFAR-10, whatever mixing uses


def _run(context: Context, record: StageRecord) -> Made:
    from csm.generators.fitting import fit_generator  # importing diffusers takes seconds; only who needs it pays

    config, directory = context.config.generator, context.workspace.generator
    data = RealDataset.load(context.workspace.root)
    images, labels = data.split("train")
    state_path = directory / "state.pt"
    state = storage.read_state(state_path) if state_path.is_file() else None
    if state is not None and state["fingerprint"] != record.fingerprint:
        state = None  # it was interrupted under other settings
    losses: list[float] = state["losses"] if state else []

    def save_state(training: dict[str, Any]) -> None:
        storage.write_state(state_path, {"fingerprint": record.fingerprint, "losses": losses, "training": training})

    with task("fit-generator", config.steps) as progress:
        progress.advance(state["training"]["step"] if state else 0)

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            progress.advance(1, f"loss {np.mean(losses[-100:]):.3f}")

        training = state["training"] if state else None
        generator = fit_generator(images, labels, data.info.n_classes, config, on_step, save_state, training)

    key = f"stage {record.name} {record.fingerprint}"
    means = [
        (step, {"loss": float(np.mean(losses[step - LOG_STEPS : step]))}) for step in range(LOG_STEPS, len(losses) + 1, LOG_STEPS)
    ]
    context.tracker.log_steps(key, means)
    classes = np.repeat(np.arange(data.info.n_classes), SAMPLES).tolist()
    samples = sample(classes, list(range(len(classes))), generator, data.info.shape, SAMPLER)
    storage.write_tensors(directory / "samples.safetensors", {"images": samples})
    grid = samples.permute(0, 2, 3, 1).reshape(data.info.n_classes, SAMPLES, *data.info.shape).numpy()
    context.tracker.log_figure(key, image_grid(grid, row_labels=data.info.class_names), "samples.png")
    generator.save(directory)  # generator.json is written last and marks the whole folder as good
    state_path.unlink(missing_ok=True)
    return Made(config.steps, storage.file_digest(directory / "model.safetensors"))


STAGE = Stage(
    name="fit-generator",
    unit="steps",
    code_version=1,
    inputs=("prepare",),
    settings=lambda config: {"generator": asdict(config.generator)},
    outputs=lambda workspace, config: [workspace.generator],
    run=_run,
    costly=True,
)
