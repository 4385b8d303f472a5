"""One step of a training: the loss of a batch of real and mixed images, and its gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from csm.augment import cutout, random_flip, random_shift
from csm.classifiers import Classifier
from csm.losses import HARD, SOFT, build_loss
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.pixel_mixing import build_pixel_mixing
from csm.precision import dtype_of
from csm.schedules import MixedSet, Schedule
from csm.sparse_labels import rows_of
from csm.world import World, to_device


class _Part(NamedTuple):
    """Images that a step puts through the network, and the class probabilities (N, K) that they should get."""

    images: torch.Tensor
    target: torch.Tensor


class Step:
    """The loss of one batch and its gradients. ``shared``: the processes that share each batch; ``world``: those that share gradients."""

    def __init__(
        self,
        classifier: Classifier,
        method: Method,
        optimizer: OptimizerConfig,
        mixed: MixedSet | None,
        device: torch.device,
        shared: World,
        world: World,
    ) -> None:
        self.optimizer, self.mixed, self.term, self.shared = optimizer, mixed, method.mixed, shared
        self.n_classes = len(classifier.spec.class_names)
        self.device, self.dtype = device, dtype_of(optimizer.precision, classifier, device)
        self.mean = classifier.mean.round().clamp(0, 255).byte()
        self.loss = build_loss(HARD, method.loss, method.parameters, "loss").to(device)
        self.mixing = build_pixel_mixing(method.mixing.kind, method.mixing.parameters, "mixing") if method.mixing else None
        if self.term and mixed:
            self.soft_loss = build_loss(SOFT, self.term.loss, {}, "mixed.loss")
            self.schedule = Schedule(self.term.schedule, self.term.per_real, mixed, self.n_classes)
            self.schedule.draw(torch.arange(self.n_classes), torch.Generator())  # what it lacks is said now, on every rank alike
        network: nn.Module = DistributedDataParallel(classifier) if world.size > 1 else classifier
        self.network: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network) if optimizer.compile else network

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, draw: torch.Generator, epoch: float) -> torch.Tensor:
        """Add the gradients of the batch's loss, and return the loss. ``epoch`` has a fraction between two epochs."""
        alone = self.term is not None and epoch < self.term.warm_start
        real = [] if alone else self._real(images, labels, draw)
        weight = 1.0 if alone else self.term.weight_at(epoch, self.optimizer.epochs) if self.term else 0.0
        companions = [self._companions(self.term, labels, draw)] if self.term and weight > 0 else []
        # One pass over all, so that BatchNorm sees the mixture on which the network is trained.
        parts = [*real, *companions]
        logits = self._forward(parts)
        loss = torch.zeros((), device=self.device)
        if companions:
            loss = weight * self.soft_loss(logits[-1], parts[-1].target)
        if len(real) == 2:
            assert self.mixing is not None
            loss = loss + self.mixing.loss(self.loss, logits[0], real[0].target, logits[1], real[1].target)
        elif real:
            loss = loss + self.loss(logits[0], real[0].target)
        (loss * self.shared.size).backward()  # the mean over processes, each of which knows its own images' part of the gradient
        return loss.detach()

    def _real(self, images: torch.Tensor, labels: torch.Tensor, draw: torch.Generator) -> list[_Part]:
        """The real images and, with pixel mixing, their mixtures, beside them or in their place."""
        part = _Part(self._augment(images, draw), F.one_hot(labels, self.n_classes).float())
        if self.mixing is None:
            return [part]
        mixture = _Part(*self.mixing.mix(*part, draw))
        return [mixture] if self.mixing.replaces else [part, mixture]

    def _companions(self, term: MixedTerm, labels: torch.Tensor, draw: torch.Generator) -> _Part:
        assert self.mixed is not None
        rows = self.schedule.draw(labels.cpu(), draw)
        images = to_device(take(self.mixed.images, rows), self.device)
        return _Part(self._augment(images, draw), to_device(rows_of(self.mixed.labels, rows), self.device))

    def _augment(self, images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        images = random_shift(images, self.optimizer.shift, draw)
        if self.optimizer.flip:
            images = random_flip(images, draw)
        return cutout(images, self.optimizer.cutout, self.mean, draw)

    def _forward(self, parts: list[_Part]) -> list[torch.Tensor]:
        """Logits float32 of each part, all of its rows; those of other processes without gradient."""
        rank, size = self.shared
        images = torch.cat([part.images[rank::size] for part in parts])
        if self.optimizer.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.network(images).float()
        own = logits.split([len(part.images[rank::size]) for part in parts])
        return [_gather(mine, len(part.images), self.shared) for mine, part in zip(own, parts, strict=True)]


def take(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` of ``tensor``, where that lies."""
    return tensor[rows.to(tensor.device)]


def _gather(own: torch.Tensor, count: int, world: World) -> torch.Tensor:
    """All ``count`` rows, of which rank r has rows r, r + size, ...; only ``own`` carry gradients."""
    if world.size == 1:
        return own
    most = -(-count // world.size)
    padded = F.pad(own.detach(), (0, 0, 0, most - len(own)))
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    distributed.all_gather(parts, padded)
    full = torch.stack(parts, dim=1).flatten(0, 1)[:count]  # (most, size, K) -> rows in order
    place = torch.zeros(count, dtype=torch.bool, device=own.device)
    place[world.rank :: world.size] = True
    return full.masked_scatter(place[:, None], own)
