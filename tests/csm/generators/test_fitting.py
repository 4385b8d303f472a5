from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from csm import storage
from csm.generators.config import GeneratorConfig
from csm.generators.fitting import fit_generator
from csm.generators.unet import NO_CLASS, UNetGenerator
from csm.world import World
from tests.csm.generators.tiny_unet import TINY, fit, noisy_data, same


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
    config = replace(TINY, steps=12, batch_size=64)
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
