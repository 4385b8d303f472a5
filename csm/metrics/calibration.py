"""Top-label calibration errors: the gap between confidence in the predicted class and accuracy."""

from torch import Tensor

from csm.metrics.binning import Bins, bin_samples
from csm.metrics.scores import check_probs


def ece(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Expected calibration error ``sum_b n_b/N |acc_b - conf_b|`` on equal-width bins.

    Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 3.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.
        n_bins: number of bins over [0, 1], > 0.

    Returns:
        0-dim float64, a fraction in [0, 1] (not percent).

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    confidence, correct = top_label(probs, labels)
    return mean_gap(bin_samples(confidence, correct, n_bins, "equal-width"))


def aece(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Adaptive ECE: :func:`ece` on equal-mass bins, so that every bin's accuracy is equally well known.

    Nguyen & O'Connor, EMNLP 2015 (the bins); Nixon et al., "Measuring calibration in deep learning", CVPR
    workshops 2019 (ACE, which averages over all classes; this is the top label only, as ECE). Every sample
    counts, also when n_bins does not divide N.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.
        n_bins: number of groups, > 0.

    Returns:
        0-dim float64, a fraction in [0, 1] (not percent).

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    confidence, correct = top_label(probs, labels)
    return mean_gap(bin_samples(confidence, correct, n_bins, "equal-mass"))


def top_label(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce K-class predictions to the confidence of the predicted class and whether it is the label.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.

    Returns:
        confidence (N,) float64 in [1/K, 1] and correct (N,) bool. Ties go to the lowest class index.

    Raises:
        ValueError: see :func:`csm.metrics.scores.check_probs`.
    """
    check_probs(probs, labels)
    confidence, predicted = probs.double().max(dim=1)
    return confidence.clamp(max=1), predicted == labels.long()  # check_probs lets a rounded 1 + 1e-7 pass


def mean_gap(bins: Bins) -> Tensor:
    """``sum_b n_b/N |outcome_b - confidence_b|``: fields (..., n_bins) -> (...), float64 in [0, 1]."""
    share = bins.count / bins.count.sum(dim=-1, keepdim=True)
    return (share * (bins.outcome - bins.confidence).abs()).sum(dim=-1)
