"""Quadratic discriminant analysis: Gaussian classes, each with a covariance of its own, drawn towards the common one; whole or low rank."""

import logging
import math
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.reannotation import ppca
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


def fit_qda(
    directory: Path,
    inputs: FitInputs,
    pooling: float = CHOOSE,
    shrinkage: float = LEDOIT_WOLF,
    rank: Annotated[int, Field(ge=-1)] = 0,
) -> dict[str, float]:
    """A Gaussian for each class of the training images, in two passes over them; all covariances are in memory, K x F x F.

    The covariance of a class is (1 - pooling) times its own plus pooling times the common one, both shrunk: regularised discriminant
    analysis (Friedman, J. American Statistical Association 84, 1989, eq. 14-18, where pooling comes before shrinkage).

    Args:
        directory: of the head.
        inputs: what it is fitted from.
        pooling: in [0, 1]; 1 is lda. -1 takes that of ``POOLINGS`` whose held-out NLL, at its best temperature, is least.
        shrinkage: of every covariance towards a multiple of the unit matrix, in [0, 1]; -1 takes Ledoit and Wolf's (2004).
        rank: of that covariance only so many leading axes are kept, and one variance for all other directions, see
            ``csm.reannotation.ppca``; 0 keeps all. -1 takes that of ``ppca.RANKS`` with the least held-out NLL; pooling -1 is then chosen
            among ``ppca.POOLINGS``.

    Returns:
        What was chosen of pooling and rank.

    Raises:
        InputError: a class has fewer than 2 training images, a feature is not finite, the images of every class are all equal, the
            covariances are too large, the rank is not below F, or no image is held out to choose by.
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
    if rank:
        ranks = [one for one in ppca.RANKS if one < inputs.features.size] if rank == CHOOSE else [rank]
        poolings = ppca.POOLINGS if pooling == CHOOSE else (pooling,)
        found = ppca.fit_low_rank(directory, inputs, means, scatter, ranks, poolings, amount, least)
        given = {"rank": rank, "pooling": pooling}
        return {name: value for name, value in found.items() if given[name] == CHOOSE}
    losses = {}
    for value in POOLINGS if pooling == CHOOSE else ():
        losses[value] = held_out_nll(_gaussians(means, scatter, value, amount, least), inputs.features, "qda")
    chosen = {"pooling": min(losses, key=losses.__getitem__)} if losses else {}
    logger.info("qda: %s, by held-out NLL: %s", chosen, losses)
    best = _gaussians(means, scatter, chosen.get("pooling", pooling), amount, least)
    storage.write_tensors(directory / "qda.safetensors", best.state_dict())
    return chosen


def load_qda(directory: Path) -> "QDA | ppca.LowRankQDA":
    """Return what ``fit_qda`` kept."""
    tensors = storage.read_tensors(directory / "qda.safetensors")
    return ppca.LowRankQDA(**tensors) if "axes" in tensors else QDA(**tensors)


def _gaussians(means: torch.Tensor, scatter: Scatter, pooling: float, shrinkage: float | None, least: float) -> QDA:
    size = means.shape[1]
    unit = torch.eye(size, dtype=torch.float64)
    whitening = torch.empty(len(means), size, size)
    offset = torch.empty(len(means))
    for label, covariance in enumerate(scatter.pooled_covariances(pooling, shrinkage)):
        factor = torch.linalg.cholesky(covariance + least * unit)
        whitening[label] = torch.linalg.solve_triangular(factor, unit, upper=False)
        offset[label] = math.log(scatter.counts[label] / scatter.counts.sum()) - factor.diagonal().log().sum()
    # One constant for all classes: large log-determinants would cost digits of float32.
    return QDA(means.float(), whitening, offset - offset.max(), torch.tensor(pooling))
