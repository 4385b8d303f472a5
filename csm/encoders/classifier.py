"""Classifiers trained on the real images as encoders: their penultimate layer, or what they say of the classes."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from csm.classifiers import Classifier, in_batches, load_classifier
from csm.encoders.sources import Sources


class Penultimate(nn.Module):
    """Features float32 (N, F) of the layer before the last."""

    CPU_BATCH = 64  # activations of more images leave a CPU's caches: 512 at once took twice as long for each

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device.type == "cpu":
            return in_batches(self.classifier.features, images, self.CPU_BATCH)
        return self.classifier.features(images)


class Teacher(nn.Module):
    """Log of the members' mean probabilities, float32 (N, K) (Lakshminarayanan et al. 2017, section 2.4)."""

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        votes = torch.stack([member(images).log_softmax(dim=1) for member in self.members])
        return votes.logsumexp(dim=0) - math.log(len(self.members))


def load_penultimate(sources: Sources) -> Penultimate:
    """The penultimate layer of the first member."""
    return Penultimate(load_classifier(sources.members[0]))


def load_teacher(sources: Sources) -> Teacher:
    """The average of all members."""
    return Teacher([load_classifier(member) for member in sources.members])
