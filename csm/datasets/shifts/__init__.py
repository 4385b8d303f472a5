"""Data that is not like the training data: corrupted images of the classes, and images of no class. Each kind of set has a name.

Corruption sets measure whether confidence stays calibrated as images get worse, sets out of distribution whether it falls.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from functools import partial
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from csm.datasets import RealDataset, source_digest
from csm.datasets.shifts.corruption_sets import cifar_c, class_folders, npy_files, tiny_imagenet_c
from csm.datasets.shifts.corruptions import CORRUPTIONS, corrupted
from csm.datasets.shifts.outside import check_other_dataset, other_dataset, photographs
from csm.datasets.shifts.part import ShiftPart
from csm.parameters import STRICT, check_name, check_parameters
from csm.storage import digest


@dataclass(frozen=True, config=STRICT)
class ShiftConfig:
    """One set: its kind, a key of ``SHIFTS``, and the settings of that kind."""

    kind: str
    parameters: dict[str, Any] = field(default_factory=dict)


class ShiftKind(NamedTuple):
    """A kind of set.

    Attributes:
        parts: ``(data, **settings)`` -> its parts for a data set, made one by one. What can be checked without reading images raises
            ``InputError`` before the first part is asked for.
        check: ``(settings, where)`` -> settings of the right types; ``InputError`` names the dotted key.
        files: ``(**settings)`` -> what must be unchanged on disk for ``parts`` to give the same again; "" if nothing.
    """

    parts: Callable[..., Iterator[ShiftPart]]
    check: Callable[[Mapping[str, Any], str], dict[str, Any]]
    files: Callable[..., str] = lambda **settings: ""


def check_shift(config: ShiftConfig, where: str) -> ShiftConfig:
    """``config`` with settings of the right types; ``InputError`` names the key below ``where`` that cannot be used."""
    check_name(f"{where}.kind", config.kind, SHIFTS)
    return ShiftConfig(config.kind, SHIFTS[config.kind].check(config.parameters, f"{where}.parameters"))


def shift_parts(config: ShiftConfig, data: RealDataset) -> Iterator[ShiftPart]:
    """The parts of a set for ``data``; one at a time is in memory."""
    return SHIFTS[config.kind].parts(data, **config.parameters)


def shift_digest(config: ShiftConfig) -> str:
    """What must be unchanged outside the configuration for ``shift_parts`` to give the same again; "" if nothing."""
    return SHIFTS[config.kind].files(**config.parameters)


def _files(find: Callable[..., list[Any]], path: str, wnids: str = "", **settings: Any) -> str:
    found = find(path, wnids) if wnids else find(path)
    return f"{len(found)} files, {digest(found)}"


def _kind(parts: Callable[..., Iterator[ShiftPart]], files: Callable[..., str] = lambda **settings: "") -> ShiftKind:
    return ShiftKind(parts, partial(check_parameters, parts), files)


SHIFTS: dict[str, ShiftKind] = {
    "cifar-c": _kind(cifar_c, partial(_files, npy_files)),
    "tiny-imagenet-c": _kind(tiny_imagenet_c, partial(_files, class_folders)),
    "corrupted": _kind(corrupted),
    "dataset": ShiftKind(other_dataset, check_other_dataset, lambda take="test", **settings: source_digest(**settings)),
    "photographs": _kind(photographs),
}

__all__ = [
    "CORRUPTIONS",
    "SHIFTS",
    "ShiftConfig",
    "ShiftKind",
    "ShiftPart",
    "check_shift",
    "shift_digest",
    "shift_parts",
]
