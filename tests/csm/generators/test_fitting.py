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
from csm.generators.unet import NO_CLASS, UNetGenerator
from csm.world import ALONE, World

TINY = GeneratorConfig(block_channels=(8, 16), steps=6, batch_size=8, dropout=0.1, checkpoint_steps=3, ema_halflife=40)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes along one axis or the other, uint8 (12, 1, 4, 4)."""
    stripes = torch.tensor([0, 255, 0, 255], dtype=torch.uint8)
    rows = stripes.view(1, 4, 1).expand(6, 1, 4, 4)
    columns = stripes.view(1, 1, 4).expand(6, 1, 4, 4)
    return torch.cat([rows, columns]), torch.tensor([0, 1]).repeat_interleave(6)


def fit(config: GeneratorConfig = TINY, **extra: Any) -> UNetGenerator:
    images, labels = data()
    return fit_generator(images, labels, 2, config, **extra)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[str, torch.Tensor], list[tuple[int, float]], list[dict[str, Any]]]:
    """Weights, (step, loss) of every step, and the states of every step."""
    losses: list[tuple[int, float]] = []
    states: list[dict[str, Any]] = []
    model = fit(
        replace(TINY, checkpoint_steps=1),
        on_step=lambda step, loss: losses.append((step, loss)),
        save_state=lambda state: states.append(deepcopy(state)),
    )
    assert not model.training
    return model.state_dict(), losses, states


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_spec_describes_the_data() -> None:
    spec = fit(replace(TINY, steps=1)).spec
    assert spec.shape == (4, 4, 1)
    assert spec.n_classes == 2
    assert spec.sigma_data == pytest.approx(1.0, abs=0.01)  # half the pixels at -1, half at 1
    assert spec.block_channels == (8, 16)


def test_the_loss_falls() -> None:
    losses: list[float] = []
    fit(replace(TINY, steps=40, batch_size=16, dropout=0.0), on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_steps_are_counted_from_one(undisturbed: Any) -> None:
    assert [step for step, _ in undisturbed[1]] == [1, 2, 3, 4, 5, 6]


def test_states_come_as_often_as_asked_and_not_after_the_last_step() -> None:
    steps: list[int] = []
    fit(replace(TINY, checkpoint_steps=2), save_state=lambda state: steps.append(state["step"]))
    assert steps == [2, 4]


def test_it_is_a_function_of_data_and_configuration(undisturbed: Any) -> None:
    torch.manual_seed(99)
    torch.rand(5)
    assert same(fit().state_dict(), undisturbed[0])
    assert not same(fit(replace(TINY, seed=1)).state_dict(), undisturbed[0])


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, undisturbed: Any) -> None:
    weights, losses, states = undisturbed
    storage.write_state(tmp_path / "state.pt", states[2])
    torch.manual_seed(7)
    later: list[tuple[int, float]] = []
    resumed = fit(state=storage.read_state(tmp_path / "state.pt"), on_step=lambda step, loss: later.append((step, loss)))
    assert same(resumed.state_dict(), weights)
    assert later == losses[3:]


def test_the_running_average_of_the_weights_by_hand(undisturbed: Any) -> None:
    states = undisturbed[2]
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5]
    torch.manual_seed(TINY.seed)
    name = "unet.conv_in.weight"
    average = UNetGenerator(fit(replace(TINY, steps=1)).spec).state_dict()[name].double()
    for state in states:
        halflife = min(40, 0.05 * state["step"] * 8)  # in images; it grows from 5 % of those seen
        keep = 0.5 ** (8 / halflife)
        average = keep * average + (1 - keep) * state["model"][name].double()
        assert torch.allclose(state["average"][name].double(), average, atol=1e-6)
    assert not torch.equal(states[-1]["average"][name], states[-1]["model"][name])


def test_the_averaged_weights_are_given_back_not_the_last_ones() -> None:
    kept: list[dict[str, Any]] = []
    config = replace(TINY, steps=40, batch_size=4, learning_rate=2e-2, checkpoint_steps=39)
    weights = fit(config, save_state=lambda state: kept.append(deepcopy(state))).state_dict()
    (state,) = kept
    keep = 0.5 ** (4 / (0.05 * 160))
    name = "unet.conv_in.weight"
    average, last = state["average"][name], state["model"][name]  # the 40th step, at the end of the cosine, moves hardly anything
    assert (weights[name] - (keep * average + (1 - keep) * last)).abs().max() < 1e-4
    assert (weights[name] - last).abs().max() > 5e-4


def test_a_share_of_the_images_is_shown_without_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[torch.Tensor] = []
    forward = UNetGenerator.forward

    def watched(self: UNetGenerator, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shown.append(labels)
        return forward(self, x, sigma, labels)

    monkeypatch.setattr(UNetGenerator, "forward", watched)
    config = replace(TINY, steps=30, batch_size=64)
    assert not fit(config).guides
    plain = torch.cat(shown)
    shown.clear()
    model = fit(replace(config, label_dropout=0.2))
    dropped = torch.cat(shown)
    assert model.guides
    assert (dropped == NO_CLASS).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(dropped[dropped != NO_CLASS], plain[dropped != NO_CLASS])  # everything else is drawn as before
    assert set(plain.tolist()) == {0, 1}


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step [2-6]; lower generator.learning_rate"):
        fit(replace(TINY, learning_rate=1e30))


def noisy_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images with no symmetry, uint8 (12, 1, 4, 4)."""
    images = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    return images, torch.tensor([0, 1]).repeat(6)


def test_mirrored_images_are_shown_if_asked_for() -> None:
    images, labels = noisy_data()
    symmetric = torch.cat([images, images.flip(-1)], dim=-1)
    both = [fit_generator(symmetric, labels, 2, replace(TINY, flip=flip)).state_dict() for flip in (False, True)]
    assert same(*both)  # a mirror changes nothing here, and takes no draws from the others
    plain, flipped = (fit_generator(images, labels, 2, replace(TINY, flip=flip)).state_dict() for flip in (False, True))
    assert not same(plain, flipped)


def test_about_half_of_the_images_are_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ramp that rises to the right is seen falling as often; without noise to speak of, the network's input shows it."""
    ramp = torch.tensor([0, 80, 160, 240], dtype=torch.uint8).expand(12, 1, 4, 4)
    rises: list[bool] = []

    def look(self: UNetGenerator, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rises.extend((x[:, 0, 0, 3] > x[:, 0, 0, 0]).tolist())
        return self.denoise(x, sigma, self.embed(labels))

    monkeypatch.setattr(UNetGenerator, "forward", look)
    fit_generator(ramp, torch.zeros(12).long(), 2, replace(TINY, steps=2, batch_size=200, flip=True, p_mean=-6.0, p_std=0.1))
    assert 160 < sum(rises) < 240  # of 400
    assert len(rises) == 400


@pytest.mark.parametrize("rows", [1, 3, 8, 50])
def test_parts_of_a_batch_do_what_the_whole_does(rows: int, alone: dict[str, Any]) -> None:
    """Up to rounding; dropout would draw its masks in another order."""
    Trained.of(replace(PLAIN, micro_batch=rows)).assert_near(alone["plain"])


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    losses: list[float] = []
    states: list[dict[str, Any]] = []
    config = replace(TINY, steps=40, batch_size=16, dropout=0.0, checkpoint_steps=39, precision="bfloat16")
    model = fit(config, on_step=lambda step, loss: losses.append(loss), save_state=lambda state: states.append(deepcopy(state)))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    moments = [value for values in states[0]["optimizer"]["state"].values() for value in values.values()]
    kept = [*model.state_dict().values(), *states[0]["model"].values(), *states[0]["average"].values(), *moments]
    assert {value.dtype for value in kept} == {torch.float32}
    full: list[float] = []
    fit(replace(config, precision="float32"), on_step=lambda step, loss: full.append(loss))
    assert losses != full
    assert losses == pytest.approx(full, rel=0.1)


def test_an_image_of_cifar_size_and_two_levels_of_attention() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    config = GeneratorConfig(
        block_channels=(16, 32, 32),
        layers_per_block=2,
        attention_levels=2,
        steps=1,
        batch_size=2,
        flip=True,
        precision="bfloat16",
    )
    assert fit_generator(images, torch.tensor([0, 1, 2, 3]), 4, config).spec.attention_levels == 2


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 8 cannot be shared by 9 processes"):
        fit(world=World(0, 9))


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
