"""The oracle: a group of one equals a direct `csm.generators.fitting.fit_job`, bit for bit; a group of two up to rounding."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fitting import fit_in_group
from cluster.groups import Delay, Setback
from cluster.resources import Group
from csm import storage
from csm.datasets.real import build
from csm.errors import InputError
from csm.generators.config import GeneratorConfig
from csm.generators.fitting import FitJob, fit_job
from csm.generators.unet import load_unet

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session", "one_thread")]

CONFIG = GeneratorConfig(block_channels=(8, 16), steps=6, batch_size=9, checkpoint_steps=2)
ONE = Group(workers=1)
TWO = Group(workers=2, cpus=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a data set of 12 grey images, 4 by 4, of 2 classes."""
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (16, 4, 4, 1), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("data")
    build("noise", images, np.arange(16) % 2, np.array(["train"] * 12 + ["val"] * 2 + ["test"] * 2), ["a", "b"]).save(folder)
    return folder


@pytest.fixture(scope="module")
def direct(data, tmp_path_factory, one_thread):
    """The job done in this process, and its losses."""
    job = FitJob(data, tmp_path_factory.mktemp("direct"), CONFIG, "fingerprint")
    return job, fit_directly(job)


def fit_directly(job: FitJob) -> list[tuple[int, float]]:
    steps: list[tuple[int, float]] = []
    fit_job(job, lambda step, loss: steps.append((step, loss)))
    return steps


def fit(job: FitJob, group: Group, tmp_path: Path) -> list[tuple[int, float]]:
    steps: list[tuple[int, float]] = []
    fit_in_group(job, group, tmp_path / "ray", "test", lambda step, loss: steps.append((step, loss)), pytest.fail)
    return steps


def denoised(directory: Path) -> torch.Tensor:
    noisy = torch.randn((6, 1, 4, 4), generator=torch.Generator().manual_seed(8))
    return load_unet(directory)(noisy, torch.full((6,), 0.7), torch.tensor([0, 1]).repeat(3))


@pytest.mark.slow
def test_a_group_of_one_equals_a_direct_call(direct, tmp_path):
    job, steps = direct
    assert fit(replace(job, directory=tmp_path), ONE, tmp_path) == steps
    for file in ("model.safetensors", "generator.json"):
        assert (tmp_path / file).read_bytes() == (job.directory / file).read_bytes(), file


@pytest.mark.slow
def test_a_group_of_two_goes_on_from_a_direct_call_and_equals_it_up_to_rounding(direct, tmp_path):
    job, steps = direct
    state = storage.read_state(job.directory / "state.pt")
    assert (state["training"]["step"], len(state["losses"])) == (4, 4)
    storage.write_state(tmp_path / "state.pt", state)
    told = fit(replace(job, directory=tmp_path), TWO, tmp_path)
    assert told[:4] == steps[:4]
    assert [step for step, _ in told] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in told] == pytest.approx([loss for _, loss in steps], rel=1e-5)
    assert torch.allclose(denoised(tmp_path), denoised(job.directory), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "count", "lost"), [("RayTrainWorker", 2, 1), ("TrainController", 1, 0)])
def test_a_killed_process_costs_no_more_than_the_steps_since_the_last_state(
    data, tmp_path, ray_head, processes, title, count, lost
):
    """One of two workers is killed in the middle, or who leads them: all steps are made in the end, and the state is gone on from."""
    job = FitJob(data, tmp_path, replace(CONFIG, steps=400, checkpoint_steps=20), "fingerprint")
    raylet = ray_head.all_processes["raylet"][0].process.pid
    told: list[int] = []
    losses: list[Setback | Delay] = []
    killed: list[int] = []

    def on_step(step: int, loss: float) -> None:
        told.append(step)
        if not killed and (tmp_path / "state.pt").is_file():
            workers = [pid for pid in processes.descendants(raylet) if title in processes.name(pid)]
            assert len(workers) == count
            killed.append(max(workers))
            os.kill(killed[0], signal.SIGKILL)

    fit_in_group(job, TWO, tmp_path / "ray", "test", on_step, losses.append)
    assert processes.left(killed, 5) == []
    starts = [number for number, step in enumerate(told) if step == 1]
    assert len(starts) == 2
    assert told[: starts[1]] == list(range(1, starts[1] + 1))
    assert told[starts[1] :] == list(range(1, 401))
    state = storage.read_state(tmp_path / "state.pt")
    assert (state["training"]["step"], len(state["losses"])) == (380, 380)
    setback, delay = losses
    assert isinstance(setback, Setback)
    assert setback.workers == lost
    assert isinstance(delay, Delay)
    assert 0 < delay.step <= starts[1]
    assert delay.step % 20 == 0
    assert delay.late > delay.repeated >= 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_error_and_is_not_tried_again(data, tmp_path):
    job = FitJob(data, tmp_path, replace(CONFIG, learning_rate=1e30), "fingerprint")
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step [2-6]; lower generator.learning_rate"):
        fit(job, TWO, tmp_path)
    assert not (tmp_path / "generator.json").exists()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group(workers=9), r"resources\.fit: 9 workers .* do not fit the cluster's 2 CPU .*; lower resources\.fit or add nodes"),
        (Group(workers=1, gpus=1), r"resources\.fit: 1 workers x \(1 CPU, 1 GPU\) do not fit"),
    ],
)
def test_a_group_that_does_not_fit_is_refused_before_work(group, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(FitJob(data, tmp_path, CONFIG, "fingerprint"), group, tmp_path)


def test_workers_do_not_share_a_gpu(data, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.groups.share", lambda: {"CPU": 4.0, "GPU": 1.0})
    with pytest.raises(InputError, match=r"resources\.fit\.gpus: expected 0 or at least 1 for each of 2 workers, got 0\.5"):
        fit(FitJob(data, tmp_path, CONFIG, "fingerprint"), Group(workers=2, gpus=0.5), tmp_path)
