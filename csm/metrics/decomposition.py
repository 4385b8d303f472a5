"""The Brier score in three parts: ``brier = brier_reliability - brier_resolution + brier_uncertainty``, exactly.

Murphy, "A new vector partition of the probability score", J. Applied Meteorology 12 (1973), of each class's probability ``p_k``
against ``1[y = k]``, summed over the classes as in :func:`csm.metrics.scores.brier`. Its three parts add up only where all
probabilities in a bin are equal; on the equal-width bins used here the resolution is therefore the generalised one of
Stephenson et al., "Two extra components in the Brier score decomposition", Weather and Forecasting 23 (2008), which takes in
the variance of the probabilities within bins and their covariance with the outcomes.

Arguments are those of :mod:`csm.metrics.calibration`; each result is 0-dim float64.
"""

import torch
from torch import Tensor

from csm.metrics.calibration import class_bins
from csm.metrics.scores import brier, check_probs


def brier_reliability(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """``sum_k sum_b n_kb/N (conf_kb - freq_kb)^2`` in [0, 2], lower is better: what a recalibration of the bins would gain."""
    bins = class_bins(probs, labels, n_bins)
    return (bins.count * (bins.confidence - bins.outcome).square()).sum() / len(labels)


def brier_resolution(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """The generalised resolution, at most :func:`brier_uncertainty`, higher is better: how far the probabilities tell images apart.

    That is ``sum_k [sum_b n_kb/N (freq_kb - freq_k)^2 - WBV_k + WBC_k]`` with ``WBV_k = sum_i (p_ik - conf_kb)^2 / N`` and
    ``WBC_k = 2 sum_i (p_ik - conf_kb) (1[y_i = k] - freq_kb) / N``, b the bin of p_ik. It is computed as what the other parts
    leave of the Brier score, which is the same number. Negative where differences within bins point the wrong way.
    """
    return brier_reliability(probs, labels, n_bins) + brier_uncertainty(probs, labels) - brier(probs, labels)


def brier_uncertainty(probs: Tensor, labels: Tensor) -> Tensor:
    """``sum_k freq_k (1 - freq_k)`` in [0, 1): the Brier score of the class frequencies; it depends on the labels alone."""
    check_probs(probs, labels)
    frequency = torch.bincount(labels.long(), minlength=probs.shape[1]).double() / len(labels)
    return (frequency * (1 - frequency)).sum()
