"""What distinguishes one training from another: losses, mixing, and the term on made images."""

import math
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from csm.parameters import STRICT

Ramp = Literal["constant", "linear-up", "linear-down", "cosine-up", "cosine-down", "cyclic"]


@dataclass(frozen=True, config=STRICT)
class MixedTerm:
    """The term on mixed images, or on those that take their place: weight * loss(soft labels of an annotator).

    Attributes:
        annotator: whose soft labels; None: of the one that the configuration names for all methods.
        loss: name in ``csm.losses.SOFT``.
        weight: of the term, at its highest.
        schedule: which mixed images, name in ``csm.schedules.SCHEDULES``.
        per_real: mixed images for each real one.
        images: their kind, see ``csm.tables.KINDS``: "semantic" mixtures, or what these are compared with; or several kinds, which are
            drawn from together.
        sets: of each kind and pair only its first so many sets are drawn from, as if the plan had no more; None: all of them.
        temperature: the soft labels q become q^(1/T), normalised: above 1 they soften, below 1 they sharpen.
        ramp: share of the weight over training: up and down are from 0 to 1 and back, ``cyclic`` a raised cosine that starts at 0.
        ramp_epochs: length of a ramp, after which its last value stays, or of a cycle; None: the whole training.
        off_after: epochs after which training goes on without mixed images; None: never.
        warm_start: epochs at the beginning that train on mixed images alone, without weight and ramp.
    """

    annotator: str | None = None
    loss: str = "l2"
    weight: float = Field(default=1.0, ge=0)
    schedule: str = "pair"
    per_real: int = Field(default=2, ge=1)
    images: str | tuple[str, ...] = "semantic"
    sets: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    ramp: Ramp = "constant"
    ramp_epochs: int | None = Field(default=None, ge=1)
    off_after: int | None = Field(default=None, ge=0)
    warm_start: int = Field(default=0, ge=0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of ``images``, in their order."""
        return (self.images,) if isinstance(self.images, str) else self.images

    @property
    def is_semantic(self) -> bool:
        """Whether it is of images between classes that a generator made: the product's own idea, not what that is compared with."""
        return "semantic" in self.kinds and self.schedule != "endpoints"

    def weight_at(self, epoch: float, epochs: int) -> float:
        """The weight at ``epoch`` of ``epochs``, which counts from 0 and has a fraction between two epochs."""
        if self.off_after is not None and epoch >= self.off_after:
            return 0.0
        place = epoch / (self.ramp_epochs or epochs)
        return self.weight * _share(self.ramp, place)


@dataclass(frozen=True, config=STRICT)
class PixelTerm:
    """Mixing of real images, pixel by pixel: ``kind`` is a name in ``csm.pixel_mixing.PIXEL_MIXING``, ``parameters`` its settings."""

    kind: str
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Method:
    """A method of training.

    Attributes:
        description: one line for the report.
        loss: name in ``csm.losses.HARD`` for the real images, ``parameters`` its settings.
        mixing: of the real images with each other, or none.
        mixed: the term on mixed images, or none.
        members: classifiers with initialisations and orders of their own whose mean probability is the prediction: a deep ensemble
            (Lakshminarayanan et al. 2017).
        optimizer: settings of ``csm.optimization.OptimizerConfig`` that this method has in place of those of all methods.
    """

    description: str = ""
    loss: str = "cross-entropy"
    parameters: dict[str, Any] = Field(default_factory=dict)
    mixing: PixelTerm | None = None
    mixed: MixedTerm | None = None
    members: int = Field(default=1, ge=1)
    optimizer: dict[str, Any] = Field(default_factory=dict)


def identity(method: Method) -> dict[str, Any]:
    """What tells ``method`` from another one, for fingerprints.

    Settings that came later are left out while they have their default: what was trained before is known again.
    """
    later = {"members": 1, "optimizer": {}}
    values = {**asdict(method), "description": ""}
    if method.mixed and len(method.mixed.kinds) == 1:
        (values["mixed"]["images"],) = method.mixed.kinds  # a list of one kind is that kind
        if method.mixed.kinds == ("semantic",):
            del values["mixed"]["images"]
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def _share(ramp: Ramp, place: float) -> float:
    """Share of the weight, in [0, 1], at ``place``: 0 is the start of a ramp or a cycle, 1 its end."""
    if ramp == "constant":
        return 1.0
    if ramp == "cyclic":
        return 0.5 * (1 - math.cos(2 * math.pi * place))
    kind, _, direction = ramp.partition("-")
    place = min(place, 1.0)
    up = place if kind == "linear" else 0.5 * (1 - math.cos(math.pi * place))
    return up if direction == "up" else 1 - up
