"""For encoders that give a class's score for each class: teachers, generators."""

from pathlib import Path

import torch
from torch import nn

from csm.errors import InputError
from csm.reannotation.heads import FitInputs


class Posterior(nn.Module):
    """log softmax of scores (N, K)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.log_softmax(dim=1)


def fit_posterior(directory: Path, inputs: FitInputs) -> None:
    """There is nothing to fit.

    Raises:
        InputError: the encoder gives another number of values than there are classes.
    """
    if inputs.features.size != inputs.n_classes:
        raise InputError(
            f"posterior: the encoder gives {inputs.features.size} values, the data has {inputs.n_classes} classes: "
            "take an encoder that scores the classes (teacher, generator), or head lda"
        )


def load_posterior(directory: Path) -> Posterior:
    return Posterior()
