"""The paper's annotator: project the feature on the line between the two class prototypes."""

from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.reannotation.heads import FitInputs, check_size
from csm.reannotation.prototypes import check_distinct, class_prototypes, project


class Projection(nn.Module):
    """Knows only the pair: the share is the projection, before the sigmoid (Luo et al. 2025)."""

    prototypes: torch.Tensor

    def __init__(self, prototypes: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes)

    def share(
        self, features: torch.Tensor | None, class_a: torch.Tensor, class_b: torch.Tensor, lam: torch.Tensor
    ) -> torch.Tensor:
        assert features is not None
        check_size(features, self.prototypes.shape[1], "projection")
        return project(features, self.prototypes[class_a], self.prototypes[class_b])


def fit_projection(directory: Path, inputs: FitInputs) -> None:
    """Keep the prototypes of the training images in ``directory``.

    Raises:
        InputError: a class has no training image, a feature is not finite, or the prototypes of two classes coincide.
    """
    prototypes = class_prototypes(inputs.features.batches("train"), inputs.n_classes)
    check_distinct(prototypes)
    storage.write_tensors(directory / "prototypes.safetensors", {"prototypes": prototypes})


def load_projection(directory: Path) -> Projection:
    """Return what ``fit_projection`` kept."""
    return Projection(storage.read_tensors(directory / "prototypes.safetensors")["prototypes"])
