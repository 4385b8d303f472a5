"""Classifiers trained on the real images as encoders: their penultimate layer, or what they say of the classes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from csm.classifiers import Classifier, in_batches, load_classifier, mean_log_probs
from csm.encoders.sources import Sources
from csm.errors import InputError

# (rows, columns) by which an image is moved: not, along one axis, along both. So many views of an image are the first of these.
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
VIEWS = (1, 5, 9)
CPU_BATCH = 64  # activations of more images leave a CPU's caches: 512 at once took twice as long for each


class Penultimate(nn.Module):
    """Features float32 (N, F) of the layer before the last."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return _small_on_cpus(self.classifier.features, images)


class Teacher(nn.Module):
    """Log of the mean probabilities over members and views, float32 (N, K) (Lakshminarayanan et al. 2017, section 2.4)."""

    def __init__(self, members: Sequence[Classifier], views: int = 1) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.views = views

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        views = [shift(images, rows, columns) for rows, columns in SHIFTS[: self.views]]
        return mean_log_probs(torch.stack([_small_on_cpus(member, view) for view in views for member in self.members]))


def shift(images: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Images (N, C, H, W) moved down by ``rows`` and right by ``columns``; black comes in, as in ``random_shift``."""
    return F.pad(images, (columns, -columns, rows, -rows)) if rows or columns else images


def _small_on_cpus(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    return in_batches(function, images, CPU_BATCH) if images.device.type == "cpu" else function(images)


def load_penultimate(sources: Sources) -> Penultimate:
    """The penultimate layer of the first member."""
    return Penultimate(load_classifier(sources.members[0]))


def load_teacher(sources: Sources, views: int = 1) -> Teacher:
    """The average of all members.

    Args:
        views: of each image: itself; with 5 also moved by one pixel along one axis; with 9 along both.

    Raises:
        InputError: another number of views.
    """
    if views not in VIEWS:
        raise InputError(f"views: expected {', '.join(map(str, VIEWS))}, got {views}")
    return Teacher([load_classifier(member) for member in sources.members], views)
