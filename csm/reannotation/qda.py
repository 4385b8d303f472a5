"""Quadratic discriminant analysis: Gaussian classes, each with a covariance of its own, drawn towards the common one."""

import logging
import math
from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.reannotation.heads import FitInputs, check_size
from csm.reannotation.lda import LEDOIT_WOLF, check_shrinkage, floor
from csm.reannotation.moments import Scatter, check_memory, class_means, class_scatters
from csm.reannotation.selection import held_out_nll

logger = logging.getLogger(__name__)

CHOOSE = -1.0
POOLINGS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)  # of equal ones the first is taken, the stiffest


class QDA(nn.Module):
    """log p(k | x) = log softmax of offset_k - ||whitening_k (x - mean_k)||^2 / 2, float32."""

    means: torch.Tensor
    whitening: torch.Tensor
    offset: torch.Tensor
    pooling: torch.Tensor

    def __init__(self, means: torch.Tensor, whitening: torch.Tensor, offset: torch.Tensor, pooling: torch.Tensor) -> None:
        super().__init__()
        for name, value in (("means", means), ("whitening", whitening), ("offset", offset), ("pooling", pooling)):
            self.register_buffer(name, value)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_size(features, self.means.shape[1], "qda")
        square = [  # class by class: memory does not grow with K
            ((features - mean) @ whitening.T).square().sum(dim=1)
            for mean, whitening in zip(self.means, self.whitening, strict=True)
        ]
        return (self.offset - torch.stack(square, dim=1) / 2).log_softmax(dim=1)


def fit_qda(directory: Path, inputs: FitInputs, pooling: float = CHOOSE, shrinkage: float = LEDOIT_WOLF) -> None:
    """A Gaussian for each class of the training images, in two passes over them; all covariances are in memory, K x F x F.

    The covariance of a class is (1 - pooling) times its own plus pooling times the common one, both shrunk: regularised discriminant
    analysis (Friedman, J. American Statistical Association 84, 1989, eq. 14-18, where pooling comes before shrinkage).

    Args:
        pooling: in [0, 1]; 1 is lda. -1 takes that of ``POOLINGS`` whose held-out NLL, at its best temperature, is least.
        shrinkage: of every covariance towards a multiple of the unit matrix, in [0, 1]; -1 takes Ledoit and Wolf's (2004).

    Raises:
        InputError: a class has fewer than 2 training images, a feature is not finite, the images of every class are all equal, the
            covariances are too large, or no image is held out to choose the pooling by.
    """
    check_shrinkage("qda", shrinkage)
    if not (0 <= pooling <= 1 or pooling == CHOOSE):
        raise InputError(f"qda.pooling: expected a number from 0 to 1, or -1 to choose it, got {pooling}")
    check_memory("qda", inputs.n_classes, inputs.features.size)
    counts, means = class_means(inputs.features.batches("train"), inputs.n_classes, "qda")
    if (counts < 2).any():
        few = ", ".join(inputs.class_names[index] for index in (counts < 2).nonzero().flatten().tolist())
        raise InputError(f"qda: only 1 training image of class {few}, at least 2 are needed: add some, or take head lda")
    scatter = class_scatters(inputs.features.batches("train"), means)
    amount = None if shrinkage == LEDOIT_WOLF else shrinkage
    least = floor(scatter, "qda")
    if pooling == CHOOSE:
        found = {}
        for value in POOLINGS:
            found[value] = held_out_nll(_gaussians(means, scatter, value, amount, least), inputs.features, "qda")
        pooling = min(found, key=found.__getitem__)
        logger.info("qda: pooling %g, by held-out NLL: %s", pooling, ", ".join(f"{k:g} {v:.4f}" for k, v in found.items()))
    storage.write_tensors(directory / "qda.safetensors", _gaussians(means, scatter, pooling, amount, least).state_dict())


def load_qda(directory: Path) -> QDA:
    """Return what ``fit_qda`` kept."""
    return QDA(**storage.read_tensors(directory / "qda.safetensors"))


def _gaussians(means: torch.Tensor, scatter: Scatter, pooling: float, shrinkage: float | None, least: float) -> QDA:
    common = scatter.pooled().covariance(0, shrinkage)
    unit = torch.eye(len(common), dtype=torch.float64)
    whitening = torch.empty(len(means), *common.shape)
    offset = torch.empty(len(means))
    for label, count in enumerate(scatter.counts):
        own = scatter.covariance(label, shrinkage)
        factor = torch.linalg.cholesky((1 - pooling) * own + pooling * common + least * unit)
        whitening[label] = torch.linalg.solve_triangular(factor, unit, upper=False)
        offset[label] = math.log(count / scatter.counts.sum()) - factor.diagonal().log().sum()
    # One constant for all classes: large log-determinants would cost digits of float32.
    return QDA(means.float(), whitening, offset - offset.max(), torch.tensor(pooling))
