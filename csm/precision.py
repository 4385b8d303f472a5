"""The number format in which a device multiplies fastest."""

from typing import Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bfloat16"]

# Below, the time of a network on a CPU goes into the calls, not the arithmetic, and bfloat16 makes it slower (measured: 4 times for the
# demo's 0.1 million parameters).
SMALL = 5_000_000


def best_dtype(network: nn.Module, device: torch.device) -> torch.dtype:
    """bfloat16 where ``device`` multiplies it in hardware and ``network`` is large enough to gain by it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        large = sum(weight.numel() for weight in network.parameters()) >= SMALL
        fast = large and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def dtype_of(precision: Precision, network: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype that ``precision`` names; "auto" is ``best_dtype``."""
    return best_dtype(network, device) if precision == "auto" else getattr(torch, precision)
