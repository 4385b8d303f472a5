"""Post-hoc calibration measured on the images that it is fitted on, each by what was fitted without it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from csm.metrics.scores import nll_from_log_probs
from csm.posthoc import POSTHOC, apply_posthoc, fit_posthoc
from csm.reannotation.calibration import FOLDS, stratified_folds


def cross_fitted(
    name: str, logits: Tensor, labels: Tensor, where: str = "", on_fold: Callable[[], None] = lambda: None
) -> Tensor:
    """Calibrated log-probabilities float64 (N, K): those of each of 5 stratified folds by ``POSTHOC[name]``, fitted on the four others.

    Args:
        name: a key of ``POSTHOC``.
        logits: (N, K), floating point, finite.
        labels: (N,), integer, in 0..K-1.
        where: for messages.
        on_fold: called after each.

    Raises:
        InputError: the name is unknown, or there are fewer images than the method needs.
    """
    log_probs = torch.empty(logits.shape, dtype=torch.float64)
    for held_out in stratified_folds(labels):
        rest = torch.ones_like(labels, dtype=torch.bool)
        rest[held_out] = False
        log_probs[held_out] = apply_posthoc(logits[held_out], fit_posthoc(name, logits[rest], labels[rest], where))
        on_fold()
    return log_probs


def can_cross_fit(name: str, images: int) -> bool:
    """Whether ``images`` are enough for :func:`cross_fitted`."""
    return images - -(-images // FOLDS) >= max(1, POSTHOC[name].images)


def least_nll(fitted: Mapping[str, Tensor], labels: Tensor) -> tuple[str, dict[str, float]]:
    """The method whose cross-fitted log-probabilities (N, K) have the least NLL, ties to the first; and the NLL of each, in nats."""
    scores = {name: nll_from_log_probs(log_probs, labels).item() for name, log_probs in fitted.items()}
    return min(scores, key=lambda name: scores[name]), scores
