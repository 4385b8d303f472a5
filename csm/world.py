"""Several processes that train one model together."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from csm.errors import InputError

T = TypeVar("T")
CPU = torch.device("cpu")


class World(NamedTuple):
    """Which of how many processes this one is; with more than one, ``torch.distributed`` is initialised."""

    rank: int = 0
    size: int = 1


ALONE = World()


def together(read: Callable[[], T], world: World) -> T:
    """What ``read()`` gives. If it cannot on one rank, all ranks raise that error, instead of waiting for the one."""
    if world.size == 1:
        return read()
    value, error = None, None
    try:
        value = read()
    except InputError as caught:
        error = caught
    errors: list[InputError | None] = [None] * world.size
    distributed.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found
    return value  # type: ignore[return-value]


def from_first(value: Any, world: World) -> Any:
    """Rank 0's ``value``, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``, without waiting for what the device has yet to do."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
