import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from csm import storage
from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.errors import InputError
from csm.methods import Method, MixedTerm, PixelTerm
from csm.metrics import evaluate
from csm.optimization import OptimizerConfig
from csm.schedules import MixedSet
from csm.training import fit, predict
from csm.world import World

Split = tuple[torch.Tensor, torch.Tensor]
Separable = Callable[..., Split]

RATIOS = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0])
OPTIMIZER = OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05, shift=1)
MIXED_TERM = MixedTerm(annotator="teacher", loss="kl", weight=2.0)
METHODS = {
    "ce": Method(),
    "mixup": Method(mixing=PixelTerm("mixup", {"alpha": 0.4})),
    "csm": Method(mixed=MIXED_TERM),
    "csm with focal and mixup": Method(
        loss="focal",
        parameters={"gamma": 2.0},
        mixing=PixelTerm("mixup"),
        mixed=MixedTerm("teacher", schedule="uniform", per_real=1),
    ),
}


@pytest.fixture(scope="module")
def real(separable: Separable) -> Split:
    return separable(16)


@pytest.fixture(scope="module")
def val(separable: Separable) -> Split:
    return separable(8, seed=1)


@pytest.fixture(scope="module")
def mixed(separable: Separable) -> MixedSet:
    """Pixel blends of the first image of each class, four ratios, two sets for each pair."""
    images, labels = separable(4, seed=2)
    pairs = [(0, 1), (0, 2), (1, 2)] * 2
    pictures, soft = [], []
    for number, (a, b) in enumerate(pairs):
        first, second = (images[labels == label][number // 3].float() for label in (a, b))
        for lam in RATIOS.tolist():
            pictures.append((lam * first + (1 - lam) * second).to(torch.uint8))
            soft.append(lam * F.one_hot(torch.tensor(a), 3) + (1 - lam) * F.one_hot(torch.tensor(b), 3))
    class_a, class_b = torch.tensor(pairs).unbind(dim=1)
    return MixedSet(torch.stack(pictures), torch.stack(soft), torch.arange(24).view(6, 4), class_a, class_b, RATIOS)


def classifier(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.4,), (0.25,)))


def weights(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_of_fewer_sets_it_learns_what_it_would_from_a_smaller_plan(real: Split, val: Split, mixed: MixedSet) -> None:
    few = replace(
        mixed,
        rows=mixed.rows[:3],
        class_a=mixed.class_a[:3],
        class_b=mixed.class_b[:3],
        images=mixed.images[:12],
        labels=mixed.labels[:12],
    )
    trained = []
    for sets, source in ((1, mixed), (None, few), (2, mixed), (None, mixed)):
        method = Method(mixed=replace(MIXED_TERM, sets=sets, schedule="uniform"))
        trained.append(weights(fit(classifier(), real, val, method, OPTIMIZER, 0, mixed=source)))
    assert same(trained[0], trained[1])
    assert same(trained[2], trained[3])
    assert not same(trained[0], trained[2])
    with pytest.raises(InputError, match="only 2 sets"):
        fit(classifier(), real, val, Method(mixed=replace(MIXED_TERM, sets=3)), OPTIMIZER, 0, mixed=mixed)


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


KEPT = {
    "ema": OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05, ema=0.9),
    "val-nll": OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05, choose="val-nll"),
    "adamw": OptimizerConfig(kind="adamw", epochs=4, batch_size=8, learning_rate=0.01, choose="val-accuracy", ema=0.5),
    "augmented": OptimizerConfig(
        epochs=4, batch_size=8, learning_rate=0.05, shift=1, flip=True, cutout=3, channels_last=True, schedule="cosine", warmup=1
    ),
    "bfloat16": OptimizerConfig(epochs=4, batch_size=8, learning_rate=0.05, precision="bfloat16", clip=0.0),
}
SCHEDULED = Method(
    loss="adafocal",
    mixed=MixedTerm("teacher", loss="kl", schedule="ambiguity", temperature=2.0, ramp="cosine-up", off_after=3, warm_start=1),
)


@pytest.mark.parametrize("name", KEPT)
def test_whatever_is_kept_a_resumed_training_ends_in_the_same_bits(
    name: str, tmp_path: Path, real: Split, val: Split, mixed: MixedSet
) -> None:
    def keep(state: dict[str, Any]) -> None:
        if state["epoch"] == 2:
            storage.write_state(tmp_path / "state.pt", state)

    expected = fit(classifier(), real, val, SCHEDULED, KEPT[name], 5, mixed, lambda *event: None, save_state=keep)
    state = storage.read_state(tmp_path / "state.pt")
    resumed = fit(classifier(seed=9), real, val, SCHEDULED, KEPT[name], 5, mixed, lambda *event: None, state=state)
    assert same(weights(resumed), weights(expected))


def test_the_average_follows_the_weights_slowly(real: Split, val: Split) -> None:
    config = OptimizerConfig(epochs=1, batch_size=len(real[0]), learning_rate=0.05)  # a single step
    start, moved = weights(classifier()), weights(fit(classifier(), real, val, Method(), config, 0))
    averaged = weights(fit(classifier(), real, val, Method(), replace(config, ema=0.9), 0))
    for name, tensor in averaged.items():
        # After the first step the decay is 1/10; running statistics are those of the network.
        expected = moved[name] if "running" in name or "num_" in name else 0.1 * start[name] + 0.9 * moved[name]
        assert torch.allclose(tensor.float(), expected.float(), atol=1e-6), name


@pytest.mark.parametrize(("choose", "key", "sign"), [("val-nll", "val_nll", 1), ("val-accuracy", "val_accuracy", -1)])
def test_the_epoch_that_is_best_on_validation_is_kept(choose: Any, key: str, sign: int, real: Split, val: Split) -> None:
    history: list[dict[str, float]] = []
    config = OptimizerConfig(epochs=6, batch_size=8, learning_rate=0.3, choose=choose)
    model = fit(classifier(), real, val, Method(), config, 1, on_epoch=lambda epoch, values: history.append(values))
    scores = evaluate(predict(model, val[0]), val[1], metrics=("accuracy", "nll"))
    assert scores[key.removeprefix("val_")] == min(sign * values[key] for values in history) * sign


def test_a_warm_start_sees_no_real_image(real: Split, val: Split, mixed: MixedSet) -> None:
    method = Method(mixed=MixedTerm("teacher", loss="kl", weight=0.0, schedule="uniform", warm_start=4))
    other = (255 - real[0], real[1])
    first, second = (weights(fit(classifier(), split, val, method, OPTIMIZER, 0, mixed)) for split in (real, other))
    assert same(first, second)


def test_when_the_mixed_term_is_off_no_mixed_image_is_seen(real: Split, val: Split, mixed: MixedSet) -> None:
    off = Method(mixed=MixedTerm("teacher", loss="kl", off_after=0))
    first, second = (
        fit(classifier(), real, val, off, OPTIMIZER, 0, images) for images in (mixed, replace(mixed, images=255 - mixed.images))
    )
    assert same(weights(first), weights(second))
    assert same(weights(first), weights(fit(classifier(), real, val, Method(), OPTIMIZER, 0)))


def test_images_on_the_host_train_the_same(real: Split, val: Split, mixed: MixedSet) -> None:
    held, waiting = (
        fit(classifier(), real, val, METHODS["csm"], replace(OPTIMIZER, hold=hold), 0, mixed) for hold in ("device", "host")
    )
    assert same(weights(held), weights(waiting))


class Batches:
    """The images in batches of their own order, as a stream gives them."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels, self.rows = images, labels, len(images)

    def batches(self, epoch: int, size: int) -> Iterator[Split]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(size):
            yield self.images[rows], self.labels[rows]


def test_a_stream_trains(real: Split, val: Split, mixed: MixedSet) -> None:
    model = fit(classifier(), Batches(*real), val, METHODS["csm"], replace(OPTIMIZER, epochs=8), 0, mixed)
    assert (predict(model, val[0]).argmax(dim=1) == val[1]).float().mean() > 0.9


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
