"""Selective prediction: how well confidence ranks the predictions, whatever its scale."""

import torch
from torch import Tensor

from csm.metrics.calibration import top_label


def aurc(probs: Tensor, labels: Tensor) -> Tensor:
    """Area under the risk-coverage curve: the mean over n = 1..N of the error rate of the n most confident predictions.

    Geifman et al., "Bias-reduced uncertainty estimation for deep neural classifiers", ICLR 2019, sec. 2 (AURC). Equal
    confidences are ranked at random: the result is the mean over their orders, so the order of the images does not matter.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.

    Returns:
        0-dim float64 in [0, 1]; 0 if every prediction is right.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    confidence, correct = top_label(probs, labels)
    levels, level, count = torch.unique(-confidence, return_inverse=True, return_counts=True)  # most confident first
    error_rate = torch.zeros_like(levels).scatter_add(0, level, (~correct).double()) / count
    errors: Tensor = error_rate.repeat_interleave(count).cumsum(0)  # expected among the n most confident
    return (errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean()
