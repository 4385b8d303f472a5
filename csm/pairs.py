"""Pairs of classes to mix: all, listed ones, or those that are most easily taken for each other."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from csm.errors import InputError

Pairs: TypeAlias = npt.NDArray[np.uint16]  # (P, 2), class_a < class_b in each row

NAMES_SHOWN = 10


def all_pairs(n_classes: int) -> Pairs:
    """Every unordered pair of different classes, uint16 (K (K - 1) / 2, 2), in lexicographic order."""
    return np.stack(np.triu_indices(n_classes, k=1), axis=1).astype(np.uint16)


def listed_pairs(pairs: Sequence[tuple[int | str, int | str]], n_classes: int, class_names: Sequence[str] = ()) -> Pairs:
    """The pairs that a user listed, uint16 (P, 2), in the order of the list.

    Args:
        pairs: whole numbers are indices of classes, texts are their names.
        n_classes: K.
        class_names: of the K classes, where names can be used.

    Raises:
        InputError: a pair names an unknown class, twice the same class, or stands twice; or there is none.
    """
    ordered = []
    for pair in pairs:
        first, second = sorted(_index(name, class_names) for name in pair)
        if first == second or first < 0 or second >= n_classes:
            raise InputError(f"plan.pairs: {list(pair)} is not a pair of two different classes of 0..{n_classes - 1}")
        ordered.append((first, second))
    if len(set(ordered)) != len(ordered) or not ordered:
        raise InputError(f"plan.pairs: expected different pairs, at least one, got {[list(pair) for pair in pairs]}")
    return np.array(ordered, dtype=np.uint16)


def nearest_pairs(distance: torch.Tensor, per_class: int) -> Pairs:
    """Pairs of each class with the ``per_class`` classes nearest to it, uint16 (P, 2), in lexicographic order.

    A pair is there if either of its classes is among the nearest of the other, so every class has at least ``per_class`` pairs, and all
    together are at most K * per_class. Of equal distances the class with the lower index is nearer.

    Args:
        distance: (K, K), symmetric; only its order matters, and its diagonal not at all.

    Raises:
        InputError: a class has fewer than ``per_class`` others, or a distance is not finite.
    """
    n_classes = len(distance)
    check_per_class(per_class, n_classes)
    if not distance.isfinite().all():
        raise InputError("plan.pairs: a distance between two classes is not finite: check the annotators and fit them again")
    others = distance.clone().fill_diagonal_(torch.inf).numpy()
    near = np.argsort(others, axis=1, kind="stable")[:, :per_class]
    pairs = np.stack([np.repeat(np.arange(n_classes), per_class), near.flatten()], axis=1)
    return np.unique(np.sort(pairs, axis=1), axis=0).astype(np.uint16)


def check_per_class(per_class: int, n_classes: int) -> None:
    """``InputError`` unless each of the classes has ``per_class`` others."""
    if not 1 <= per_class < n_classes:
        raise InputError(f"plan.pairs_per_class: expected 1 to {n_classes - 1} for {n_classes} classes, got {per_class}")


def prototype_distances(prototypes: torch.Tensor) -> torch.Tensor:
    """Euclidean distances float64 (K, K) between class prototypes (K, F), see ``csm.reannotation.prototypes``."""
    points = prototypes.double()
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def confusion_distances(log_posterior: torch.Tensor, labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Minus the soft confusion of each pair, float64 (K, K): -(mean p(b | images of a) + mean p(a | images of b)).

    Counted by the mass of the posterior rather than by the top class, classes that are never taken for each other have an order too.

    Args:
        log_posterior: (N, K) of held-out real images.
        labels: int64 (N,).

    Raises:
        InputError: a class has no image.
    """
    counts = torch.bincount(labels, minlength=n_classes)
    if (counts == 0).any():
        raise InputError(f"plan.pairs: class {int((counts == 0).nonzero()[0])} has no validation image to measure confusion on")
    mass = torch.zeros(n_classes, n_classes, dtype=torch.float64).index_add_(0, labels, log_posterior.double().exp())
    mean = mass / counts[:, None]
    return -(mean + mean.T)


def _index(name: int | str, class_names: Sequence[str]) -> int:
    if isinstance(name, int):
        return name
    if name not in class_names:
        shown = ", ".join([*class_names[:NAMES_SHOWN], *(["..."] if len(class_names) > NAMES_SHOWN else [])])
        raise InputError(f"plan.pairs: no class is named {name!r}; the classes are {shown}")
    return list(class_names).index(name)
