import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from csm import storage
from csm.errors import InputError
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.schedules import MixedSet
from csm.training import fit, predict
from csm.world import World
from tests.csm.training.small import METHODS, OPTIMIZER, RATIOS, Split, classifier, same, weights


@pytest.mark.parametrize("name", METHODS)
def test_a_training_is_a_function_of_its_seed(name: str, real: Split, val: Split, mixed: MixedSet) -> None:
    method = METHODS[name]
    companions = mixed if method.mixed else None
    results = []
    for disturbance, seed in enumerate((5, 5, 6)):
        torch.manual_seed(disturbance)  # the global generator has no say
        results.append(weights(fit(classifier(), real, val, method, OPTIMIZER, seed, companions)))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_training_ends_in_the_same_bits(
    name: str, epoch: int, tmp_path: Path, real: Split, val: Split, mixed: MixedSet
) -> None:
    method = METHODS[name]
    companions = mixed if method.mixed else None
    undisturbed: list[tuple[int, dict[str, float]]] = []

    def keep(state: dict[str, Any]) -> None:
        if state["epoch"] == epoch:
            storage.write_state(tmp_path / "state.pt", state)

    expected = fit(
        classifier(), real, val, method, OPTIMIZER, 5, companions, lambda *event: undisturbed.append(event), save_state=keep
    )
    later: list[tuple[int, dict[str, float]]] = []
    resumed = fit(
        classifier(seed=9),  # its weights are replaced by those of the state
        real, val, method, OPTIMIZER, 5, companions, lambda *event: later.append(event),
        state=storage.read_state(tmp_path / "state.pt"),
    )  # fmt: skip
    assert same(weights(resumed), weights(expected))
    assert later == undisturbed[epoch:]
    assert [number for number, _ in later] == list(range(epoch + 1, 5))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_what_is_easy(name: str, real: Split, val: Split, mixed: MixedSet) -> None:
    method = METHODS[name]
    history: list[dict[str, float]] = []
    model = fit(
        classifier(), real, val, method, OptimizerConfig(epochs=8, batch_size=8, learning_rate=0.05), 0,
        mixed if method.mixed else None, lambda epoch, values: history.append(values),
    )  # fmt: skip
    assert not model.training
    assert len(history) == 8
    assert set(history[0]) == {"loss", "learning_rate", "val_accuracy", "val_nll", "val_ece"}
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    logits = predict(model, val[0])
    assert (logits.argmax(dim=1) == val[1]).float().mean() > 0.9
    assert history[-1]["val_accuracy"] == pytest.approx((logits.argmax(dim=1) == val[1]).double().mean().item())
    assert history[-1]["val_nll"] == pytest.approx(F.cross_entropy(logits.double(), val[1]).item(), rel=1e-5)


def test_the_loss_of_a_step_is_cross_entropy_plus_the_weighted_mixed_term(real: Split, val: Split) -> None:
    # One step on all images; the mixed images are all alike, so it does not matter which are drawn.
    images, labels = real
    one, soft = images[:1], torch.tensor([[0.6, 0.3, 0.1]])
    alike = MixedSet(
        one.expand(12, -1, -1, -1),
        soft.expand(12, 3),
        torch.arange(12).view(3, 4),
        torch.tensor([0, 0, 1]),
        torch.tensor([1, 2, 2]),
        RATIOS,
    )
    history: list[dict[str, float]] = []
    method = Method(mixed=MixedTerm("teacher", loss="l2", weight=3.0, per_real=2))
    once = OptimizerConfig(epochs=1, batch_size=len(images))
    fit(classifier(), real, val, method, once, 0, alike, lambda epoch, values: history.append(values))

    logits = classifier().train()(torch.cat([images, one.expand(2 * len(images), -1, -1, -1)]))
    hard = F.cross_entropy(logits[: len(images)], labels)
    squared = ((logits[len(images) :].softmax(dim=1) - soft) ** 2).sum(dim=1).mean()
    assert history[0]["loss"] == pytest.approx((hard + 3.0 * squared).item(), rel=1e-4)


def test_validation_images_are_only_measured(real: Split, val: Split) -> None:
    other = (255 - val[0], (val[1] + 1) % 3)
    first, second = (
        weights(fit(classifier(), real, split, Method(), OPTIMIZER, 0, on_epoch=lambda *event: None)) for split in (val, other)
    )
    assert same(first, second)
    assert same(first, weights(fit(classifier(), real, other, Method(), OPTIMIZER, 0)))


def test_the_learning_rate_rises_over_a_tenth_and_falls_as_a_cosine(real: Split, val: Split) -> None:
    rates: list[float] = []
    optimizer = OptimizerConfig(epochs=20, batch_size=24, learning_rate=0.4)  # two steps an epoch, 40 in all
    fit(classifier(), real, val, Method(), optimizer, 0, on_epoch=lambda epoch, values: rates.append(values["learning_rate"]))
    last_steps = [2 * epoch + 1 for epoch in range(20)]  # counted from 0
    expected = [0.4 * (step + 1) / 4 if step < 4 else 0.2 * (1 + math.cos(math.pi * (step - 4) / 36)) for step in last_steps]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_a_batch_are_one_batch(real: Split, val: Split) -> None:
    few = (real[0][:5], real[1][:5])
    history: list[int] = []
    before = weights(classifier())
    model = fit(
        classifier(),
        few,
        val,
        Method(),
        OptimizerConfig(epochs=2, batch_size=64),
        0,
        on_epoch=lambda epoch, values: history.append(epoch),
    )
    assert history == [1, 2]
    assert not same(weights(model), before)


def test_a_state_is_offered_after_every_epoch_but_the_last(real: Split, val: Split) -> None:
    epochs: list[int] = []
    fit(classifier(), real, val, Method(), OPTIMIZER, 0, save_state=lambda state: epochs.append(state["epoch"]))
    assert epochs == [1, 2, 3]


def test_mixed_term_and_mixed_images_come_together(real: Split, val: Split, mixed: MixedSet) -> None:
    for method, companions in ((METHODS["csm"], None), (Method(), mixed)):
        with pytest.raises(ValueError, match="a mixed term needs mixed images and mixed images need a mixed term"):
            fit(classifier(), real, val, method, OPTIMIZER, 0, companions)


@pytest.mark.parametrize("name", ["ce", "csm"])
def test_a_loss_that_is_not_finite_stops_the_training(name: str, real: Split, val: Split, mixed: MixedSet) -> None:
    broken, method = classifier(), METHODS[name]
    with torch.no_grad():
        broken.network.head.bias.fill_(float("nan"))
    states: list[Any] = []
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 1; lower train.optimizer.learning_rate"):
        fit(broken, real, val, method, OPTIMIZER, 0, mixed if method.mixed else None, save_state=states.append)
    assert states == []


def test_predictions_are_those_of_the_evaluation_mode(real: Split) -> None:
    model = classifier().train()
    before = weights(model)
    logits = predict(model, real[0])
    assert same(weights(model), before)  # no running statistic has moved
    with torch.no_grad():
        assert torch.equal(logits, deepcopy(model).eval()(real[0]))
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


@pytest.mark.parametrize("broken", ["classifier", "optimizer", "loss", "best"])
def test_the_state_of_another_training_is_refused(broken: str, real: Split, val: Split) -> None:
    states: list[dict[str, Any]] = []
    fit(classifier(), real, val, Method(), OPTIMIZER, 0, save_state=states.append)
    state = {**states[0], broken: {"no": torch.ones(1)}}
    if broken == "best":
        del state["best"]
    with pytest.raises(InputError, match="the saved state is of another network, optimiser or loss"):
        fit(classifier(), real, val, Method(), OPTIMIZER, 0, state=state)


def test_a_batch_that_cannot_be_shared_is_refused(real: Split, val: Split) -> None:
    with pytest.raises(InputError, match="8 images cannot be shared evenly by 3 workers"):
        fit(classifier(), real, val, Method(), OPTIMIZER, 0, world=World(0, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("hold", ["device", "host"])
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu_a_training_is_that_of_the_cpu_up_to_rounding(
    name: str, hold: Any, real: Split, val: Split, mixed: MixedSet
) -> None:
    method = METHODS[name]
    optimizer = replace(OPTIMIZER, epochs=2, precision="float32", channels_last=True, hold=hold)
    logits = []
    for device in ("cpu", "cuda"):
        model = fit(classifier(), real, val, method, optimizer, 5, mixed if method.mixed else None, device=torch.device(device))
        assert model.mean.device.type == device
        logits.append(predict(model, val[0]))
    assert torch.allclose(*logits, atol=2e-2)
