"""Training of a classifier on real images and, if given, on mixed ones."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from csm.classifiers import Classifier, in_batches
from csm.errors import InputError
from csm.methods import Method
from csm.metrics import evaluate
from csm.optimization import OptimizerConfig, build_optimizer, learning_rate
from csm.schedules import MixedSet, soften
from csm.training_step import Step, take
from csm.world import ALONE, CPU, World, from_first, to_device

OnEpoch = Callable[[int, dict[str, float]], None]
Split = tuple[torch.Tensor, torch.Tensor]
HELD_SHARE = 0.4  # of a device's free memory that images may take; the rest is for activations


class Stream(Protocol):
    """Real images that do not fit in memory; ``rows`` of them make an epoch."""

    rows: int

    def batches(self, epoch: int, size: int) -> Iterator[Split]:
        """This worker's batches of ``epoch``, each of ``size`` images uint8 (B, C, H, W) and labels int64 (B,), in an order of its own."""
        ...


def fit(
    classifier: Classifier,
    real: Split | Stream,
    val: Split,
    method: Method,
    optimizer: OptimizerConfig,
    seed: int,
    mixed: MixedSet | None = None,
    on_epoch: OnEpoch | None = None,
    save_state: Callable[[dict[str, Any]], None] | None = None,
    state: dict[str, Any] | None = None,
    device: torch.device = CPU,
    world: World = ALONE,
) -> Classifier:
    """Train ``classifier`` in place, on ``device``, and return it there in evaluation mode with the weights of the epoch that is kept.

    On one CPU process, a pure function of its arguments and the number of threads: every epoch draws from its own seed, so a training
    that goes on from a saved state gives the same weights as an undisturbed one. A GPU adds in an order of its own.

    Several processes share every batch: all of them draw, augment and mix the whole batch alike, each puts every size-th image through
    its network, and each computes the loss of the whole batch, so losses that compare images stay what they are. So n processes do what
    one does up to the order of sums, but for BatchNorm, which sees one process's images (and running statistics are those of rank 0),
    and dropout. From a stream, each process draws, augments and mixes batches of its own, and the gradients are averaged.

    Args:
        classifier: with fresh weights; like all arguments but ``device`` and ``world``, the same on every rank.
        real: training images uint8 (N, C, H, W) and labels int64 (N,), or a stream of them.
        val: the same for validation; only measured, never trained on.
        method, optimizer: what to do.
        seed: of batches, augmentation and mixing.
        mixed: images and soft labels for ``method.mixed``.
        on_epoch: called on rank 0 after each epoch, counted from 1, with loss, learning rate and validation metrics.
        save_state: called on rank 0 after each epoch with a state for ``storage.write_state``.
        state: a state to go on from, of any number of processes and any device.
        device: of this process.
        world: this process and the others.

    Raises:
        FloatingPointError: the loss is not finite; on every rank.
        InputError: the state is of another network, the batch cannot be shared evenly, or there are fewer mixed sets than asked for.
        ValueError: ``method.mixed`` and ``mixed`` do not come together.
    """
    if (method.mixed is None) != (mixed is None):
        raise ValueError("a mixed term needs mixed images and mixed images need a mixed term")
    if optimizer.batch_size % world.size:
        raise InputError(
            f"train.optimizer.batch_size: {optimizer.batch_size} images cannot be shared evenly by {world.size} workers"
        )
    classifier.to(device)
    if optimizer.channels_last:
        nn.Module.to(classifier, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = deepcopy(classifier).requires_grad_(False).eval() if optimizer.ema else None
    kept = average or classifier
    adapt = build_optimizer(classifier, optimizer)
    if method.mixed and mixed:
        mixed = mixed.first(method.mixed.sets)
        mixed = replace(mixed, labels=soften(mixed.labels, method.mixed.temperature))
    if isinstance(real, tuple):
        rows = len(real[0])
        real, mixed = _hold(real, mixed, optimizer, device)
    else:
        rows = real.rows
    step = Step(classifier, method, optimizer, mixed, device, world if isinstance(real, tuple) else ALONE, world)
    # A last batch of one image would break BatchNorm; images left over come first in no epoch for long, as each is shuffled anew.
    per_epoch = max(1, rows // optimizer.batch_size)
    start, best = 0, None
    if state is not None:
        start, best = _restore(state, classifier, average, adapt, step.loss)

    for epoch in range(start, optimizer.epochs):
        local = 0 if isinstance(real, tuple) else world.rank
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch + local * 2**40)
        torch.manual_seed(seed * 1_000_003 + epoch + world.rank * 2**40)  # of dropout
        classifier.train()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, (images, labels) in enumerate(_batches(real, epoch, per_epoch, optimizer.batch_size, draw, device, world)):
            rate = learning_rate(optimizer, epoch * per_epoch + number, per_epoch)
            for group in adapt.param_groups:
                group["lr"] = rate
            adapt.zero_grad(set_to_none=True)
            total += step(images, labels, draw, epoch + number / per_epoch)
            if optimizer.clip:
                nn.utils.clip_grad_norm_(classifier.parameters(), optimizer.clip)
            adapt.step()
            if average is not None:
                _update(average, classifier, optimizer.ema, epoch * per_epoch + number)
        loss = _mean_loss(total, step.shared, world) / per_epoch
        if not math.isfinite(loss):
            raise FloatingPointError(f"training: loss is {loss} in epoch {epoch + 1}; lower train.optimizer.learning_rate")
        if on_epoch or optimizer.choose != "last" or step.loss.state_dict():
            logits = from_first(predict(kept, val[0]) if world.rank == 0 else None, world)
            step.loss.observe(logits.to(device), val[1].to(device))
            scores = evaluate(logits, val[1], metrics=("accuracy", "nll", "ece"))
            best = _better(best, scores, epoch + 1, kept, optimizer)
            if on_epoch and world.rank == 0:
                measured = {f"val_{name}": value for name, value in scores.items()}
                on_epoch(epoch + 1, {"loss": loss, "learning_rate": rate, **measured})
        if save_state and world.rank == 0 and epoch + 1 < optimizer.epochs:
            states = {"classifier": classifier.state_dict(), "optimizer": adapt.state_dict(), "loss": step.loss.state_dict()}
            averaged = None if average is None else average.state_dict()
            save_state({"epoch": epoch + 1, **states, "average": averaged, "best": best})
    classifier.load_state_dict(kept.state_dict() if best is None else best["weights"])
    return classifier.eval()


def predict(classifier: Classifier, images: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """Logits float32 (N, K) of images uint8 (N, C, H, W), in evaluation mode, on the CPU."""
    classifier.eval()
    return in_batches(lambda batch: classifier(to_device(batch, classifier.mean.device)).float(), images, batch_size)


def _batches(
    real: Split | Stream, epoch: int, per_epoch: int, size: int, draw: torch.Generator, device: torch.device, world: World
) -> Iterator[Split]:
    """The ``per_epoch`` batches of ``epoch``, on ``device``."""
    if isinstance(real, tuple):
        images, labels = real
        order = torch.randperm(len(images), generator=draw)
        for rows in order[: per_epoch * size].split(size):
            yield to_device(take(images, rows), device), to_device(take(labels, rows), device)
    else:
        stream = real.batches(epoch, size // world.size)
        for _ in range(per_epoch):
            images, labels = next(stream)
            yield to_device(images, device), to_device(labels, device)


def _hold(real: Split, mixed: MixedSet | None, optimizer: OptimizerConfig, device: torch.device) -> tuple[Split, MixedSet | None]:
    """The images where they wait for their batches."""
    pixels = real[0].numel() + (0 if mixed is None else mixed.images.numel())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    where = device if optimizer.hold == "device" or (optimizer.hold == "auto" and pixels < HELD_SHARE * free) else CPU
    if mixed is not None:
        mixed = replace(mixed, images=mixed.images.to(where), labels=mixed.labels.to(where))
    return (real[0].to(where), real[1].to(where)), mixed


def _mean_loss(total: torch.Tensor, shared: World, world: World) -> float:
    """The loss that all processes agree on: they have the same if they shared the batches, else the mean."""
    if world.size > shared.size:
        distributed.all_reduce(total)
        total /= world.size
    return total.item()


def _update(average: Classifier, classifier: Classifier, decay: float, step: int) -> None:
    """Exponential moving average; in the beginning it forgets faster, so that the random start does not linger."""
    decay = min(decay, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(classifier.parameters()), 0)
    for kept, new in zip(average.buffers(), classifier.buffers(), strict=True):
        kept.copy_(new)


def _better(
    best: dict[str, Any] | None, scores: dict[str, float], epoch: int, classifier: Classifier, optimizer: OptimizerConfig
) -> dict[str, Any] | None:
    """The epoch to keep after ``epoch`` was measured; None if it is the last, whatever it measures."""
    if optimizer.choose == "last":
        return None
    value = scores["nll"] if optimizer.choose == "val-nll" else -scores["accuracy"]
    if best is not None and best["value"] <= value:
        return best
    weights = {name: tensor.detach().cpu().clone() for name, tensor in classifier.state_dict().items()}
    return {"value": value, "epoch": epoch, "weights": weights}


def _restore(
    state: dict[str, Any], classifier: Classifier, average: Classifier | None, adapt: torch.optim.Optimizer, loss: nn.Module
) -> tuple[int, dict[str, Any] | None]:
    """Load ``state``; give the epochs that are done, and the best one so far."""
    try:
        classifier.load_state_dict(state["classifier"])
        if average is not None:
            average.load_state_dict(state["average"])
        adapt.load_state_dict(state["optimizer"])
        loss.load_state_dict(state["loss"])
        return state["epoch"], state["best"]
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the saved state is of another network, optimiser or loss ({reason}): remove it to start from zero"
        ) from None
