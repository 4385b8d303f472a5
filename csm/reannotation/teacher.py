"""A K-class annotator: the posterior of classifiers trained on the real images."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from csm.classifiers import Classifier, in_batches, load_classifier


class Teacher:
    """Averages the probabilities of its members (Lakshminarayanan et al. 2017, eq. for the uniform mixture)."""

    def __init__(self, members: Sequence[Classifier]) -> None:
        self.members = members

    def __call__(
        self, images: torch.Tensor, class_a: torch.Tensor, class_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        log_posterior = self.log_posterior(images)
        row = torch.arange(len(images))
        share = torch.sigmoid(log_posterior[row, class_a] - log_posterior[row, class_b])
        return share, log_posterior

    def log_posterior(self, images: torch.Tensor) -> torch.Tensor:
        votes = torch.stack([in_batches(member, images).log_softmax(dim=1) for member in self.members])
        return votes.logsumexp(dim=0) - math.log(len(self.members))


def fit_teacher(directory: Path, members: Sequence[Path], images: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Teacher:
    """The members are trained already and there is nothing else to fit: the same as ``load_teacher``."""
    return load_teacher(directory, members)


def load_teacher(directory: Path, members: Sequence[Path]) -> Teacher:
    """Return the teacher of the classifiers saved in ``members``; it keeps nothing of its own in ``directory``."""
    return Teacher([load_classifier(member) for member in members])
