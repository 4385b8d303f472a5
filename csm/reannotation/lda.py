"""Linear discriminant analysis: Gaussian classes of one covariance."""

from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.reannotation.heads import FitInputs, check_size
from csm.reannotation.moments import Scatter, check_memory, class_means, pooled_scatter

FLOOR = 1e-6  # of the mean variance, added to every eigenvalue: a dimension may be constant
LEDOIT_WOLF = -1.0


class LDA(nn.Module):
    """log p(k | x) = log softmax of weight_k . (x - center) + bias_k, float32."""

    center: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    shrinkage: torch.Tensor

    def __init__(self, center: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shrinkage: torch.Tensor) -> None:
        super().__init__()
        for name, value in (("center", center), ("weight", weight), ("bias", bias), ("shrinkage", shrinkage)):
            self.register_buffer(name, value)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_size(features, self.weight.shape[1], "lda")
        return nn.functional.linear(features - self.center, self.weight, self.bias).log_softmax(dim=1)


def fit_lda(directory: Path, inputs: FitInputs, shrinkage: float = LEDOIT_WOLF) -> None:
    """Means, priors and the shrunk within-class covariance of the training images, in two passes over them.

    Args:
        shrinkage: of the covariance towards a multiple of the unit matrix, in [0, 1]; -1 takes Ledoit and Wolf's (2004).

    Raises:
        InputError: a class has no training image, a feature is not finite, the images of every class are all equal, or F is too large.
    """
    check_shrinkage("lda", shrinkage)
    check_memory("lda", 1, inputs.features.size)
    counts, means = class_means(inputs.features.batches("train"), inputs.n_classes, "lda")
    scatter = pooled_scatter(inputs.features.batches("train"), means)
    amount = scatter.ledoit_wolf(0) if shrinkage == LEDOIT_WOLF else shrinkage
    covariance = scatter.covariance(0, amount)
    factor = torch.linalg.cholesky(covariance + floor(scatter, "lda") * torch.eye(len(covariance), dtype=torch.float64))
    priors = counts / counts.sum()
    center = priors @ means
    weight = torch.cholesky_solve((means - center).T, factor).T  # (K, F)
    bias = priors.log() - ((means - center) * weight).sum(dim=1) / 2
    tensors = {"center": center, "weight": weight, "bias": bias, "shrinkage": torch.tensor(amount)}
    storage.write_tensors(directory / "lda.safetensors", {name: tensor.float() for name, tensor in tensors.items()})


def load_lda(directory: Path) -> LDA:
    """Return what ``fit_lda`` kept."""
    return LDA(**storage.read_tensors(directory / "lda.safetensors"))


def check_shrinkage(where: str, shrinkage: float) -> None:
    """Raise ``InputError`` unless ``shrinkage`` lies in [0, 1] or is -1."""
    if not (0 <= shrinkage <= 1 or shrinkage == LEDOIT_WOLF):
        raise InputError(f"{where}.shrinkage: expected a number from 0 to 1, or -1 for Ledoit and Wolf's, got {shrinkage}")


def floor(scatter: Scatter, where: str) -> float:
    """What is added to the eigenvalues of every covariance: ``FLOOR`` times the mean variance within the classes.

    Raises:
        InputError: there is no variance.
    """
    total = scatter.pooled()
    variance = float(total.scatter[0].trace() / total.counts[0] / total.scatter.shape[1])
    if variance == 0:
        raise InputError(f"{where}: the features of each class are all equal: give it more training images, or take head knn")
    return FLOOR * variance
