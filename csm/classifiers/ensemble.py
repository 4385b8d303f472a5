"""Deep ensembles (Lakshminarayanan et al., NeurIPS 2017, section 2.4): networks of different initialisation and order of images."""

import math
from collections.abc import Sequence

import torch
from torch import nn


class NetworkEnsemble(nn.Module):
    """Networks of one kind in place of one: the log of their mean probabilities, and their features side by side."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(networks)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([member.features(x) for member in self.members], dim=1)  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mean_log_probs(torch.stack([member(x) for member in self.members]))


def mean_log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log of the mean over members of the probabilities: logits (M, ..., K) -> (..., K); finite for finite logits."""
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
