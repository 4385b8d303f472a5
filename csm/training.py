"""Training of a classifier on real images and, if given, on mixed ones."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from csm.augment import random_shift
from csm.classifiers import Classifier, in_batches
from csm.losses import HARD, SOFT, build_loss
from csm.metrics import evaluate
from csm.pixel_mixing import Mixup
from csm.schedules import MixedSet, Schedule

OnEpoch = Callable[[int, dict[str, float]], None]
Split = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OptimizerConfig:
    """How long and how fast: the same for every method that is compared.

    Attributes:
        epochs: passes over the real training images.
        batch_size: real images of a step.
        learning_rate: of SGD, highest value of a one-cycle schedule (linear up over the first tenth, cosine to 0).
        clip: largest norm of the gradient.
        shift: random translation of real and mixed images, in pixels.
    """

    epochs: int = Field(default=60, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    clip: float = Field(default=2.0, gt=0)
    shift: int = Field(default=0, ge=0)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MixedTerm:
    """The term on mixed images: weight * loss(soft labels of an annotator).

    Attributes:
        annotator: whose soft labels; None: of the one that the configuration names for all methods.
        loss: name in ``csm.losses.SOFT``.
        schedule: name in ``csm.schedules.SCHEDULES``.
        per_real: mixed images for each real one.
    """

    annotator: str | None = None
    loss: str = "l2"
    weight: float = Field(default=1.0, ge=0)
    schedule: str = "pair"
    per_real: int = Field(default=2, ge=1)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Method:
    """What distinguishes one method from another.

    Attributes:
        description: one line for the report.
        loss: name in ``csm.losses.HARD`` for the real images, ``parameters`` its settings.
        mixup: alpha of Beta(alpha, alpha); 0 is off.
        mixed: the term on mixed images, or none.
    """

    description: str = ""
    loss: str = "cross-entropy"
    parameters: dict[str, float] = Field(default_factory=dict)
    mixup: float = Field(default=0.0, ge=0)
    mixed: MixedTerm | None = None


def fit(
    classifier: Classifier,
    real: Split,
    val: Split,
    method: Method,
    optimizer: OptimizerConfig,
    seed: int,
    mixed: MixedSet | None = None,
    on_epoch: OnEpoch | None = None,
    save_state: Callable[[dict[str, Any]], None] | None = None,
    state: dict[str, Any] | None = None,
) -> Classifier:
    """Train ``classifier`` in place and return it in evaluation mode, with the weights of the last epoch.

    A pure function of its arguments and the number of threads: every epoch draws from its own seed, so a training that goes on from
    a saved state gives the same weights as an undisturbed one.

    Args:
        classifier: with fresh weights.
        real: training images uint8 (N, C, H, W) and labels int64 (N,).
        val: the same for validation; only measured, never trained on.
        method, optimizer: what to do.
        seed: of batches, augmentation and mixing.
        mixed: images and soft labels for ``method.mixed``.
        on_epoch: called after each epoch, counted from 1, with loss, learning rate and validation metrics.
        save_state: called after each epoch with a state for ``storage.write_state``.
        state: a state to go on from.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: ``method.mixed`` and ``mixed`` do not come together.
    """
    if (method.mixed is None) != (mixed is None):
        raise ValueError("a mixed term needs mixed images and mixed images need a mixed term")
    n_classes = len(classifier.spec.class_names)
    step = _Step(classifier, method, optimizer, mixed, n_classes)
    sgd = torch.optim.SGD(
        classifier.parameters(), lr=optimizer.learning_rate, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay,
        nesterov=optimizer.momentum > 0,
    )  # fmt: skip
    images, labels = real
    # A last batch of one image would break BatchNorm; images left over come first in no epoch for long, as each is shuffled anew.
    per_epoch = max(1, len(images) // optimizer.batch_size)
    start = 0
    if state is not None:
        start = state["epoch"]
        classifier.load_state_dict(state["classifier"])
        sgd.load_state_dict(state["sgd"])

    for epoch in range(start, optimizer.epochs):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=draw)
        classifier.train()
        total = 0.0
        for number in range(per_epoch):
            rate = optimizer.learning_rate * _one_cycle(epoch * per_epoch + number, optimizer.epochs * per_epoch)
            for group in sgd.param_groups:
                group["lr"] = rate
            batch = order[number * optimizer.batch_size : (number + 1) * optimizer.batch_size]
            loss = step(images[batch], labels[batch], draw)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), optimizer.clip)
            sgd.step()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"training: loss is {total} in epoch {epoch + 1}; lower train.optimizer.learning_rate")
        if on_epoch:
            scores = evaluate(predict(classifier, val[0]), val[1], metrics=("accuracy", "nll", "ece"))
            measured = {f"val_{name}": value for name, value in scores.items()}
            on_epoch(epoch + 1, {"loss": total / per_epoch, "learning_rate": rate, **measured})
        if save_state and epoch + 1 < optimizer.epochs:
            save_state({"epoch": epoch + 1, "classifier": classifier.state_dict(), "sgd": sgd.state_dict()})
    return classifier.eval()


def predict(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Logits float32 (N, K) of images uint8 (N, C, H, W), in evaluation mode, on the CPU."""
    return in_batches(classifier.eval(), images)


class _Step:
    """The loss of one batch."""

    def __init__(
        self, classifier: Classifier, method: Method, optimizer: OptimizerConfig, mixed: MixedSet | None, n_classes: int
    ) -> None:
        self.classifier, self.method, self.optimizer, self.mixed, self.n_classes = classifier, method, optimizer, mixed, n_classes
        self.loss = build_loss(HARD, method.loss, method.parameters, "loss")
        if method.mixed and mixed:
            self.soft_loss = build_loss(SOFT, method.mixed.loss, {}, "mixed.loss")
            self.schedule = Schedule(method.mixed.schedule, method.mixed.per_real, mixed, n_classes)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        target = F.one_hot(labels, self.n_classes).float()
        images = random_shift(images, self.optimizer.shift, draw)
        if self.method.mixup > 0:
            images, target = Mixup(self.method.mixup).mix(images, target, draw)
        if not (self.method.mixed and self.mixed):
            return self.loss(self.classifier(images), target)
        rows = self.schedule.draw(labels, draw)
        companions = random_shift(self.mixed.images[rows], self.optimizer.shift, draw)
        # One pass over both, so that BatchNorm sees the mixture on which the network is trained.
        logits = self.classifier(torch.cat([images, companions]))
        hard = self.loss(logits[: len(images)], target)
        soft = self.soft_loss(logits[len(images) :], self.mixed.labels[rows])
        return hard + self.method.mixed.weight * soft


def _one_cycle(step: int, steps: int) -> float:
    """Share of the learning rate: linear up over the first tenth of the steps, then a cosine down to 0."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
