"""Training a generator as a job: gone on with from its own state, in parts of a batch, and shared by two processes."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from csm import storage
from csm.datasets.real import build
from csm.errors import InputError
from csm.generators.config import GeneratorConfig
from csm.generators.fitting import FitJob, fit_generator, fit_job
from csm.world import ALONE, World
from tests.csm.generators.tiny_unet import TINY, noisy_data, same

# Odd, so that one of two processes has more rows than the other.
PLAIN = replace(TINY, batch_size=9, dropout=0.0, flip=True, checkpoint_steps=3)
SHARED = {
    "plain": PLAIN,
    "in parts": replace(PLAIN, micro_batch=2),
    "dropout": replace(PLAIN, dropout=0.3),
    "bfloat16": replace(PLAIN, precision="bfloat16"),
    "resumed": PLAIN,
    "not finite": replace(PLAIN, learning_rate=1e30),
}


class Trained:
    """What a training leaves: weights, what the generator makes of a batch, losses, states and what it raised."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        denoised: torch.Tensor | None,
        losses: list[float],
        states: list[dict[str, Any]],
        error: str,
    ) -> None:
        self.weights, self.denoised, self.losses, self.states, self.error = weights, denoised, losses, states, error

    @classmethod
    def of(cls, config: GeneratorConfig, world: World = ALONE, state: dict[str, Any] | None = None) -> "Trained":
        images, labels = noisy_data()
        losses: list[float] = []
        states: list[dict[str, Any]] = []
        hear = {
            "on_step": lambda step, loss: losses.append(loss),
            "save_state": lambda state: states.append(deepcopy(state)),
        }
        try:
            model = fit_generator(images, labels, 2, config, state=state, world=world, **hear)
        except FloatingPointError as error:
            return cls({}, None, losses, states, str(error))
        noisy = torch.randn((6, 1, 4, 4), generator=torch.Generator().manual_seed(8))
        with torch.no_grad():
            denoised = model(noisy, torch.full((6,), 0.7), torch.tensor([0, 1]).repeat(3))
        return cls(model.state_dict(), denoised, losses, states, "")

    def assert_near(self, other: "Trained", since: int = 0) -> None:
        """The same up to rounding, after step ``since``. Weights are not compared: some have no effect, hence a gradient of nothing
        but rounding, which Adam makes as large as any."""
        assert self.losses == pytest.approx(other.losses[since:], rel=1e-5)
        assert self.denoised is not None
        assert other.denoised is not None
        assert torch.allclose(self.denoised, other.denoised, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``noisy_data`` as a data set's train split."""
    path = tmp_path_factory.mktemp("data")
    images, labels = (np.concatenate([array, array[:4]]) for array in noisy_data())
    splits = np.array(["train"] * 12 + ["val"] * 2 + ["test"] * 2)
    build("noise", images.transpose(0, 2, 3, 1), labels, splits, ["a", "b"]).save(path)
    return path


def test_a_job_saves_the_generator_and_goes_on_from_its_own_state(folder: Path, tmp_path: Path) -> None:
    job = FitJob(folder, tmp_path, PLAIN, "one")
    losses: list[tuple[int, float]] = []
    fit_job(job, lambda step, loss: losses.append((step, loss)))
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert same(storage.read_tensors(tmp_path / "model.safetensors"), Trained.of(PLAIN).weights)
    state = storage.read_state(tmp_path / "state.pt")
    assert (state["fingerprint"], state["training"]["step"]) == ("one", 3)
    assert list(enumerate(state["losses"], start=1)) == losses[:3]

    told: list[tuple[int, float]] = []
    storage.write_state(tmp_path / "state.pt", {**state, "losses": [9.0, 8.0, 7.0]})
    fit_job(job, lambda step, loss: told.append((step, loss)))
    assert told == [(1, 9.0), (2, 8.0), (3, 7.0), *losses[3:]]  # the state was used
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    told.clear()
    fit_job(replace(job, fingerprint="two"), lambda step, loss: told.append((step, loss)))
    assert told == losses  # the state was of another job


def test_a_damaged_state_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(InputError, match=r"state.pt is a damaged training state .*: remove it to start from zero"):
        fit_job(FitJob(folder, tmp_path, PLAIN, "one"))


def share(rank: int, folder: Path, data: Path) -> None:
    """One of two processes: every training of ``SHARED``, into files; and two jobs that one process cannot read."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, config in SHARED.items():
        state = storage.read_state(folder / "state.pt") if name == "resumed" else None
        storage.write_state(folder / f"{name} {rank}.pt", vars(Trained.of(config, World(rank, 2), state)))
    unseen = folder / "nowhere" if rank == 1 else data
    for name, job in {
        "damaged": FitJob(data, folder / "damaged", PLAIN, "one"),
        "unseen": FitJob(unseen, folder / "unseen", PLAIN, "one"),
    }.items():
        try:
            fit_job(job, world=World(rank, 2))
        except InputError as error:
            storage.write_state(folder / f"{name} {rank}.pt", vars(Trained({}, None, [], [], str(error))))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    """The trainings that two processes share, in one."""
    return {name: Trained.of(config) for name, config in SHARED.items()}


@pytest.fixture(scope="module")
def shared(alone: dict[str, Trained], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trained]]:
    """What each of two processes made of the trainings in ``SHARED``; "resumed" goes on from the state of a single process."""
    made = tmp_path_factory.mktemp("shared")
    storage.write_state(made / "state.pt", alone["plain"].states[0])
    (made / "damaged").mkdir()
    (made / "damaged" / "state.pt").write_bytes(b"no state")  # read by rank 0 alone
    multiprocessing.spawn(share, (made, folder), nprocs=2)
    names = [*SHARED, "damaged", "unseen"]
    return {name: [Trained(**storage.read_state(made / f"{name} {rank}.pt")) for rank in (0, 1)] for name in names}


@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_parts_of_a_batch_do_what_the_whole_does(rows: int, alone: dict[str, Any]) -> None:
    """Up to rounding; dropout would draw its masks in another order."""
    Trained.of(replace(PLAIN, micro_batch=rows)).assert_near(alone["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "in parts"])
def test_two_processes_do_what_one_does(name: str, shared: dict[str, list[Trained]], alone: dict[str, Trained]) -> None:
    shared[name][0].assert_near(alone["plain"])


@pytest.mark.slow
def test_two_processes_do_what_one_does_in_bfloat16(shared: dict[str, list[Trained]], alone: dict[str, Trained]) -> None:
    assert shared["bfloat16"][0].losses == pytest.approx(alone["bfloat16"].losses, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "dropout", "bfloat16", "resumed"])
def test_both_processes_end_with_the_same_weights(name: str, shared: dict[str, list[Trained]]) -> None:
    first, second = shared[name]
    assert same(first.weights, second.weights)


@pytest.mark.slow
def test_processes_do_not_share_dropout_masks(shared: dict[str, list[Trained]], alone: dict[str, Trained]) -> None:
    assert shared["dropout"][0].losses == pytest.approx(alone["dropout"].losses, rel=0.3)
    assert shared["dropout"][0].losses[1:] != pytest.approx(alone["dropout"].losses[1:], rel=1e-4)


@pytest.mark.slow
def test_only_the_first_process_reports_and_keeps_states(shared: dict[str, list[Trained]]) -> None:
    first, second = shared["plain"]
    assert len(first.losses) == 6
    assert [state["step"] for state in first.states] == [3]
    assert (second.losses, second.states) == ([], [])


@pytest.mark.slow
def test_two_processes_go_on_from_the_state_of_one(shared: dict[str, list[Trained]], alone: dict[str, Trained]) -> None:
    shared["resumed"][0].assert_near(alone["plain"], since=3)


@pytest.mark.slow
def test_one_process_goes_on_from_the_state_of_two(shared: dict[str, list[Trained]], alone: dict[str, Trained]) -> None:
    state = shared["plain"][0].states[0]
    Trained.of(PLAIN, state=state).assert_near(alone["plain"], since=3)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_every_process(shared: dict[str, list[Trained]]) -> None:
    first, second = (trained.error for trained in shared["not finite"])
    assert first == second
    assert "lower generator.learning_rate" in first


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), [("damaged", "state.pt is a damaged"), ("unseen", "dataset.json does not exist")])
def test_what_one_process_cannot_read_stops_every_process(name: str, message: str, shared: dict[str, list[Trained]]) -> None:
    first, second = (trained.error for trained in shared[name])
    assert first == second
    assert message in first
