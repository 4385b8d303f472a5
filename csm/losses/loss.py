"""What all losses are once they are built: ``loss(logits, target) -> scalar``, with whatever state they have in buffers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

# The ranges of the losses' settings, see ``csm.parameters.check_parameters``.
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Loss(nn.Module):
    """A loss with its settings bound. ``state_dict()`` is all of its state: nothing but for losses that override ``observe``."""

    if TYPE_CHECKING:

        def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor: ...

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over the batch.

        Args:
            logits: float (N, K), N >= 1.
            target: float (N, K), rows on the simplex: one-hot for a label.

        Returns:
            Scalar, float32 or wider.
        """
        raise NotImplementedError

    def observe(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take note of the validation split after an epoch: logits float (N, K), labels int64 (N,). Most losses do nothing."""


class FunctionLoss(Loss):
    """``function(logits, target, **parameters)`` as a ``Loss`` without state."""

    def __init__(self, function: Callable[..., torch.Tensor], parameters: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.settings = function, dict(parameters)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.function(logits, target, **self.settings)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 if it was narrower: the sums and powers of a loss are not for bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
