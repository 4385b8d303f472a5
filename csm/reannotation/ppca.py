"""Gaussian classes of low rank: probabilistic principal components (Tipping & Bishop, J. Royal Statistical Society B 61, 1999)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.reannotation.heads import FitInputs, check_size
from csm.reannotation.moments import Scatter
from csm.reannotation.selection import held_out_nll

logger = logging.getLogger(__name__)

RANKS = (2, 4, 6, 9, 12, 16, 24)
POOLINGS = (1.0, 0.7, 0.5, 0.35, 0.2, 0.0)


class LowRankQDA(nn.Module):
    """log p(k | x) = log softmax of offset_k - d_k / 2, float32; d_k is the squared distance to mean_k by covariance k.

    That has the variances ``along`` (K, r) on the orthonormal columns of ``axes`` (K, F, r), and ``rest`` (K,) in every other direction.
    """

    means: torch.Tensor
    axes: torch.Tensor
    along: torch.Tensor
    rest: torch.Tensor
    offset: torch.Tensor

    def __init__(
        self, means: torch.Tensor, axes: torch.Tensor, along: torch.Tensor, rest: torch.Tensor, offset: torch.Tensor
    ) -> None:
        super().__init__()
        tensors = {"means": means, "axes": axes, "along": along, "rest": rest, "offset": offset}
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_size(features, self.means.shape[1], "qda")
        square = []
        for mean, axes, along, rest in zip(self.means, self.axes, self.along, self.rest, strict=True):
            centred = features - mean
            inside = centred @ axes  # (N, r)
            outside = centred - inside @ axes.T  # (N, F); the difference of two squares would cost digits of float32
            square.append((inside.square() / along).sum(dim=1) + outside.square().sum(dim=1) / rest)
        return (self.offset - torch.stack(square, dim=1) / 2).log_softmax(dim=1)


def fit_low_rank(
    directory: Path,
    inputs: FitInputs,
    means: torch.Tensor,
    scatter: Scatter,
    ranks: Sequence[int],
    poolings: Sequence[float],
    shrinkage: float | None,
    least: float,
) -> dict[str, float]:
    """Of all ``ranks`` and ``poolings`` keep the head with the least held-out NLL at its best temperature, and return which it is.

    The covariance of a class is that of ``Scatter.pooled_covariances``, of which the ``rank`` leading eigenvectors stay and every other
    eigenvalue becomes the mean of the others: the maximum likelihood of probabilistic principal components (Tipping & Bishop, eq. 8), after
    the covariance is drawn towards the common one (Friedman 1989). Of equal ones the first is taken.

    Args:
        directory: of the head.
        inputs: held-out features to choose by, not read where there is one rank and one pooling.
        means: float64 (K, F).
        scatter: of every class.
        ranks: each below F.
        poolings, shrinkage, least: as for ``csm.reannotation.qda.fit_qda``; ``least`` is added to every eigenvalue.

    Raises:
        InputError: there is no rank to take, or no held-out image to choose by.
    """
    if not ranks or max(ranks) >= means.shape[1]:
        wanted = f"{max(ranks)} principal axes" if ranks else f"{min(RANKS)} principal axes or more"
        raise InputError(f"qda.rank: {wanted} of {means.shape[1]} features: expected fewer axes than features; set rank 0")
    found: dict[tuple[int, float], float] = {}
    best: LowRankQDA | None = None
    for pooling in poolings:
        spectra = [_leading(covariance, max(ranks)) for covariance in scatter.pooled_covariances(pooling, shrinkage)]
        for rank in ranks:
            head = _low_rank(means, scatter.counts, spectra, rank, least)
            only = len(ranks) == len(poolings) == 1
            nll = 0.0 if only else held_out_nll(head, inputs.features, "qda")
            if best is None or nll < min(found.values()):
                best = head
            found[rank, pooling] = nll
    assert best is not None
    rank, pooling = min(found, key=found.__getitem__)
    logger.info("qda: rank %d, pooling %g, by held-out NLL: %s", rank, pooling, found)
    storage.write_tensors(directory / "qda.safetensors", best.state_dict())
    return {"rank": rank, "pooling": pooling}


def _leading(covariance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``count`` largest eigenvalues, largest first, their eigenvectors (F, count), and the trace."""
    values, vectors = torch.linalg.eigh(covariance)
    return values[-count:].flip(0), vectors[:, -count:].flip(1), covariance.trace()


def _low_rank(
    means: torch.Tensor,
    counts: torch.Tensor,
    spectra: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    rank: int,
    least: float,
) -> LowRankQDA:
    others = means.shape[1] - rank
    axes = torch.stack([vectors[:, :rank] for _, vectors, _ in spectra])
    along = torch.stack([values[:rank].clamp(min=0) for values, _, _ in spectra]) + least
    rest = torch.stack([(trace - values[:rank].sum()).clamp(min=0) / others for values, _, trace in spectra]) + least
    offset = counts.log() - (along.log().sum(dim=1) + others * rest.log()) / 2
    # One constant for all classes: large log-determinants would cost digits of float32.
    return LowRankQDA(*(tensor.float() for tensor in (means, axes, along, rest, offset - offset.max())))
