"""Posteriors of many classes, stored as their most probable ones and what is left for the others together.

What is left, rho, is read as spread evenly over the K - m classes that are not stored: nothing else of them is known without the real
images, and a table should say what it says by itself. (By the classes' frequencies would be the alternative; it is the same where
classes are balanced, and where they are not, the posterior of the stored ones has the frequencies in it already.)

Calibrators are applied when labels are read, so to the completed row. For a temperature T let t = 1 / T, A the sum of p^t over the stored
classes and B that over the others; the completed row has B' = (K - m)^(1 - t) rho^t in place of B. Let C be B' for t <= 1, where it is at
least B (Jensen), and rho p_m^(t - 1) for t > 1, with p_m the least of the stored, where B and B' are at most that. Then the total variation
between the label of the completed row and that of the whole row is at most C / (A + C), which the table alone tells: the stored classes
keep their proportions, so what one label has more than the other lies within the share that the others have in one of the two.
"""

import math
from typing import NamedTuple

import torch

from csm.errors import InputError

DENSE = 100  # classes of a data set up to which all are stored by default
SHARE, LEAST = 8, 32  # of more, one in so many, and at least so many: docs/reannotation.md says what that loses


class Truncated(NamedTuple):
    """The ``m`` most probable classes of N images, the most probable first.

    Attributes:
        classes: int64 (N, m).
        log_posterior: of these, float32 (N, m).
        log_rest: log of the sum over all other classes, float32 (N,).
    """

    classes: torch.Tensor
    log_posterior: torch.Tensor
    log_rest: torch.Tensor


def stored_classes(n_classes: int, top: int | None) -> int | None:
    """How many of K classes are stored of each image, None for all: ``top``, by default an eighth of more than ``DENSE``.

    Raises:
        InputError: ``top`` is more than there are.
    """
    if top is not None and top > n_classes:
        raise InputError(f"annotate.top: expected at most the {n_classes} classes of the data, got {top}")
    stored = top if top is not None else max(LEAST, -(-n_classes // SHARE)) if n_classes > DENSE else n_classes
    return stored if stored < n_classes else None


def truncate(log_posterior: torch.Tensor, top: int) -> Truncated:
    """The ``top`` < K most probable classes of a log-posterior (N, K), and the mass of the others, however small."""
    kept, classes = log_posterior.float().topk(top, dim=1)
    return Truncated(classes, kept, log_posterior.float().scatter(1, classes, -torch.inf).logsumexp(dim=1))


def complete(truncated: Truncated, n_classes: int) -> torch.Tensor:
    """The log-posterior float32 (N, K) that ``truncated`` stands for."""
    each = truncated.log_rest - math.log(n_classes - truncated.classes.shape[1])
    return each[:, None].repeat(1, n_classes).scatter_(1, truncated.classes, truncated.log_posterior)
