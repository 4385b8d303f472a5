"""A generator on its device, in the precision and memory layout in which that device is fast."""

from typing import TypeVar

import torch
from torch import nn

from csm.errors import InputError
from csm.generators import Generator
from csm.precision import Precision, dtype_of

G = TypeVar("G", bound=Generator)


def accelerate(generator: G, device: str = "cpu", precision: Precision = "auto", compiled: bool = False) -> G:
    """Move ``generator`` to ``device`` and its network to ``precision``, in place, and return it.

    Only what is evaluated at each noise level changes its precision: noise levels, preconditioning, the state of the solver and the
    decoder stay as they are. Weights lie channels-last in bfloat16 and on a GPU, as the fast convolutions there want them.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        precision: "auto" is ``best_dtype``.
        compiled: let torch.compile fuse the network, on a GPU into CUDA graphs; minutes at the first batch of each size, less from the
            next process on (TORCHINDUCTOR_CACHE_DIR keeps what it made). Needs a C++ compiler on a CPU.

    Raises:
        InputError: there is no such device.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InputError("resources.mix.gpus: torch finds no CUDA device on this node: install its CUDA build, or set gpus to 0")
    generator.to(where)
    network = generator.network
    if network is None:
        return generator
    dtype = dtype_of(precision, network, where)
    layout = torch.preserve_format if dtype == torch.float32 and where.type == "cpu" else torch.channels_last
    nn.Module.to(network, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]  # diffusers' own `to` warns
    if where.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every batch but the last of a shard has the same shape
    if compiled:
        network.compile(dynamic=False, mode="reduce-overhead" if where.type == "cuda" else None)
    return generator
