"""The paper's annotator: project the feature on the line between the two class prototypes."""

from collections.abc import Sequence
from pathlib import Path

import torch

from csm import storage
from csm.classifiers import in_batches
from csm.encoders import ENCODERS, Encoder
from csm.reannotation.prototypes import class_prototypes, project


class Projection:
    """Knows only the pair: ``lam_raw`` is the projection, there is no K-class posterior (Luo et al. 2025)."""

    def __init__(self, encoder: Encoder, prototypes: torch.Tensor) -> None:
        self.encoder = encoder
        self.prototypes = prototypes

    def __call__(
        self, images: torch.Tensor, class_a: torch.Tensor, class_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = in_batches(self.encoder, images)
        return project(features, self.prototypes[class_a], self.prototypes[class_b]), None

    def log_posterior(self, images: torch.Tensor) -> torch.Tensor | None:
        return None


def fit_projection(
    directory: Path, members: Sequence[Path], images: torch.Tensor, labels: torch.Tensor, n_classes: int
) -> Projection:
    """Compute the prototypes of the real training images with the first member's features and keep them in ``directory``."""
    encoder = ENCODERS["classifier"](members[0])
    batches = ((in_batches(encoder, part), names) for part, names in zip(images.split(512), labels.split(512), strict=True))
    prototypes = class_prototypes(batches, n_classes)
    storage.write_tensors(directory / "prototypes.safetensors", {"prototypes": prototypes})
    return Projection(encoder, prototypes)


def load_projection(directory: Path, members: Sequence[Path]) -> Projection:
    """Return what ``fit_projection`` kept."""
    prototypes = storage.read_tensors(directory / "prototypes.safetensors")["prototypes"]
    return Projection(ENCODERS["classifier"](members[0]), prototypes)
