"""Which images a training sees, and which weights are kept of it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from csm import storage
from csm.errors import InputError
from csm.methods import Method, MixedTerm
from csm.metrics import evaluate
from csm.optimization import OptimizerConfig
from csm.schedules import MixedSet
from csm.training import fit, predict
from tests.csm.training.small import METHODS, MIXED_TERM, OPTIMIZER, Split, classifier, same, weights


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
