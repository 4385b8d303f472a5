"""Nearest neighbours: the classes of the training images that lie closest."""

import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import nn

from csm import storage
from csm.errors import InputError
from csm.reannotation.heads import FitInputs, check_size
from csm.reannotation.moments import class_means

logger = logging.getLogger(__name__)

CHOOSE = 0
NEIGHBOURS = (5, 10, 20, 50, 100)
BANDWIDTHS = (0.1, 0.2, 0.4, 0.8)
LEFT_OUT = 10_000  # training images at most that are left out in turn
BLOCK = 2**24  # numbers in memory for a block of queries


class KNN(nn.Module):
    """Votes of the nearest training images, weighted by distance, and one vote of the class priors.

    With d_1 <= d_2 <= ... the Euclidean distances of the training images, image i of the first k votes for its class with weight
    w_i = exp(-(d_i^2 - d_1^2) / (2 h^2 d_{k+1}^2)), so the nearest has one vote: distance-weighted votes (Dudani, IEEE Trans. SMC 6,
    1976), the weight a Gaussian kernel of the distance relative to that of neighbour k + 1 (Hechenbichler & Schliep, SFB 386 discussion
    paper 399, 2004). p(c | x) = (votes_c + prior_c) / (votes + 1) is the m-estimate with m = 1 (Cestnik, ECAI 1990), never 0.
    """

    center: torch.Tensor
    features: torch.Tensor
    labels: torch.Tensor
    priors: torch.Tensor
    neighbours: torch.Tensor
    bandwidth: torch.Tensor

    def __init__(
        self,
        center: torch.Tensor,
        features: torch.Tensor,
        labels: torch.Tensor,
        priors: torch.Tensor,
        neighbours: torch.Tensor,
        bandwidth: torch.Tensor,
    ) -> None:
        """Of the training images: ``features`` float32 (M, F) less their mean ``center`` (F,), ``labels`` int64 (M,), ``priors`` (K,).

        ``neighbours`` (k < M) and ``bandwidth`` (h) are 0-dim.
        """
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("features", features)
        self.register_buffer("labels", labels)
        self.register_buffer("priors", priors)
        self.register_buffer("neighbours", neighbours)
        self.register_buffer("bandwidth", bandwidth)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_size(features, self.features.shape[1], "knn")
        count, bandwidth = int(self.neighbours), float(self.bandwidth)
        blocks = [
            _log_posterior(square, self.labels[index], self.priors, count, bandwidth)
            for square, index in _nearest(features - self.center, self.features, count + 1)
        ]
        return torch.cat(blocks) if blocks else features.new_empty(0, len(self.priors))


def fit_knn(directory: Path, inputs: FitInputs, neighbours: int = CHOOSE, bandwidth: float = CHOOSE) -> None:
    """Keep the training images' features, all in memory here and where the head is used (float32, M x F).

    Args:
        neighbours: k, at least 1; 0 takes that of ``NEIGHBOURS`` of the highest log-likelihood when each training image (of more than
            ``LEFT_OUT``, so many at equal steps) is left out in turn.
        bandwidth: h, above 0; 0 takes that of ``BANDWIDTHS`` in the same way.

    Raises:
        InputError: a class has no training image, a feature is not finite, or there are fewer than k + 2 training images.
    """
    if neighbours < 0:
        raise InputError(f"knn.neighbours: expected a whole number of at least 1, or 0 to choose it, got {neighbours}")
    if not 0 <= bandwidth < float("inf"):
        raise InputError(f"knn.bandwidth: expected a number above 0, or 0 to choose it, got {bandwidth}")
    counts, means = class_means(inputs.features.batches("train"), inputs.n_classes, "knn")
    features, labels = inputs.features.matrix("train")
    least = (neighbours or min(NEIGHBOURS)) + 2
    if len(labels) < least:
        raise InputError(
            f"knn: there are {len(labels)} training images, at least {least} are needed: add some, or set fewer neighbours"
        )
    priors = counts / counts.sum()
    center = (priors @ means).float()
    features -= center  # squares of distances are differences of squares, which lose digits far from the origin
    counts_tried = [neighbours] if neighbours else [count for count in NEIGHBOURS if count + 2 <= len(labels)]
    settings = list(product(counts_tried, [bandwidth] if bandwidth else BANDWIDTHS))
    if len(settings) > 1:
        settings = [_best(features, labels, priors.float(), settings)]
    neighbours, bandwidth = settings[0]
    chosen = {"neighbours": torch.tensor(neighbours), "bandwidth": torch.tensor(bandwidth)}
    kept = {"center": center, "features": features, "labels": labels, "priors": priors.float()}
    storage.write_tensors(directory / "knn.safetensors", kept | chosen)


def load_knn(directory: Path) -> KNN:
    """Return what ``fit_knn`` kept."""
    return KNN(**storage.read_tensors(directory / "knn.safetensors"))


def _best(
    features: torch.Tensor, labels: torch.Tensor, priors: torch.Tensor, settings: list[tuple[int, float]]
) -> tuple[int, float]:
    """Of (k, h) the one of the highest log-likelihood of training images that are left out in turn."""
    own = torch.arange(0, len(labels), -(-len(labels) // LEFT_OUT))
    total = torch.zeros(len(settings), dtype=torch.float64)
    start = 0
    for square, index in _nearest(features[own], features, max(count for count, _ in settings) + 1, own):
        truth = labels[own[start : start + len(index)], None]
        start += len(index)
        for number, (count, bandwidth) in enumerate(settings):
            total[number] += _log_posterior(square, labels[index], priors, count, bandwidth).gather(1, truth).double().sum()
    best = settings[int(total.argmax())]
    logger.info("knn: %d neighbours, bandwidth %g: left-out NLL %.4f", *best, -total.max() / len(own))
    return best


def _nearest(
    queries: torch.Tensor, features: torch.Tensor, count: int, own: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Squared distances, ascending, and rows of ``features`` (B, count) that are nearest, for blocks of ``queries`` in order.

    ``own`` int64 (N,) is the row of ``features`` that each query passes over. Memory does not grow with the number of queries.
    """
    rows = max(1, BLOCK // max(len(features), count * features.shape[1]))
    squares = features.square().sum(dim=1)
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        order = torch.addmm(squares, block, features.T, alpha=-2)  # (B, M), the squared distance less the query's own square
        if own is not None:
            order.scatter_(1, own[start : start + rows, None], float("inf"))
        index = order.topk(count, largest=False).indices
        square, place = (block[:, None] - features[index]).square().sum(dim=2).sort(dim=1)  # exact, also of equal images
        yield square, index.gather(1, place)


def _log_posterior(
    square: torch.Tensor, labels: torch.Tensor, priors: torch.Tensor, count: int, bandwidth: float
) -> torch.Tensor:
    """Log-posterior (B, K) from squared distances, ascending, and labels (B, > count) of the nearest."""
    farthest = square[:, count, None].clamp(min=torch.finfo(square.dtype).tiny)  # 0 if so many images are equal
    weight = torch.exp((square[:, :1] - square[:, :count]) / farthest / (2 * bandwidth**2))
    votes = priors.expand(len(square), -1).scatter_add(1, labels[:, :count], weight)
    return votes.log() - votes.sum(dim=1, keepdim=True).log()
