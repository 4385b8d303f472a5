"""What went in: the ratio of the mixture, taken at its word. The floor that every annotator must beat."""

from pathlib import Path

import torch
from torch import nn

from csm.reannotation.heads import FitInputs


class Ratio(nn.Module):
    """The share of class a is ``lam``."""

    def share(
        self, features: torch.Tensor | None, class_a: torch.Tensor, class_b: torch.Tensor, lam: torch.Tensor
    ) -> torch.Tensor:
        return lam


def fit_ratio(directory: Path, inputs: FitInputs | None) -> None:
    """There is nothing to fit."""


def load_ratio(directory: Path) -> Ratio:
    return Ratio()
