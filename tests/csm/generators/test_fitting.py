from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from csm import storage
from csm.generators.config import GeneratorConfig
from csm.generators.fitting import fit_generator
from csm.generators.unet import UNetGenerator

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


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step [2-6]; lower generator.learning_rate"):
        fit(replace(TINY, learning_rate=1e30))
