"""Classifier-free guidance: away from what the network predicts without a class."""

from collections.abc import Callable

import torch

from csm.errors import InputError
from csm.generators import Generator

ConditionalNetwork = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def set_guidance(generator: Generator, scale: float) -> None:
    """Let ``generator.denoise`` be guided with ``scale``, in place; 1 is none.

    Raises:
        InputError: it has no condition of no class.
    """
    if scale != 1 and not generator.guides:
        raise InputError(
            f"mix.guidance: this generator has no condition of no class, which guidance leads away from: expected 1, got {scale:g}; "
            "train one with generator.label_dropout=0.1, or import a DiT or Stable Diffusion"
        )
    generator.guidance = scale


def guided(
    network: ConditionalNetwork, z: torch.Tensor, steps: torch.Tensor, condition: torch.Tensor, none: torch.Tensor, scale: float
) -> torch.Tensor:
    """F(none) + scale (F(condition) - F(none)) (Ho & Salimans 2022, eq. 6, whose w is scale - 1), float32 (N, C, H, W).

    To guide epsilon, v or the sample is to guide D(x; sigma), which is an affine function of each with factors that know no condition.

    Args:
        network: (z (N, C, H, W), steps (N,), condition (N, ...)) -> prediction (N, C, H, W).
        z, steps, condition: of the N rows.
        none: the condition (1, ...) of no class.
        scale: 1 is no guidance and costs one evaluation of N rows; any other costs one of 2 N.
    """
    if scale == 1:
        return network(z, steps, condition)
    both = torch.cat([condition, none.expand_as(condition)])
    with_class, without = network(z.repeat(2, 1, 1, 1), steps.repeat(2), both).chunk(2)
    return without + scale * (with_class - without)
