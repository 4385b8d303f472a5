"""Calibration errors: the gap between confidence and accuracy, of the predicted class or of each class.

Every one is ``(probs, labels[, n_bins]) -> 0-dim float64``:

* probs: (N, K), floating point, rows in [0, 1] that sum to 1.
* labels: (N,), integer, in 0..K-1.
* n_bins: number of bins, > 0.

and a fraction in [0, 1] (not percent). ValueError: an argument is out of range or shapes do not match.
"""

import torch
from torch import Tensor

from csm.metrics.binning import Bins, bin_samples, check_n_bins
from csm.metrics.scores import BLOCK, check_probs


def ece(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Expected calibration error ``sum_b n_b/N |acc_b - conf_b|`` on equal-width bins.

    Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 3.
    """
    confidence, correct = top_label(probs, labels)
    return mean_gap(bin_samples(confidence, correct, n_bins, "equal-width"))


def aece(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Adaptive ECE: :func:`ece` on equal-mass bins, so that every bin's accuracy is equally well known.

    Nguyen & O'Connor, EMNLP 2015 (the bins); Nixon et al., "Measuring calibration in deep learning", CVPR
    workshops 2019 (ACE, which averages over all classes; this is the top label only, as ECE). Every sample
    counts, also when n_bins does not divide N.
    """
    confidence, correct = top_label(probs, labels)
    return mean_gap(bin_samples(confidence, correct, n_bins, "equal-mass"))


def classwise_ece(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Class-wise ECE: the mean over all K classes of the ECE of ``p_k`` against ``1[y = k]``, on equal-width bins.

    Kull et al., "Beyond temperature scaling", NeurIPS 2019, sec. 2 (classwise-ECE). A class without images counts as any
    other: probability given to it is an error. Most probabilities of many classes are near 0, so values are small: compare
    them only for the same K.
    """
    return mean_gap(class_bins(probs, labels, n_bins)).mean()


def mce(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Maximum calibration error: the largest ``|acc_b - conf_b|`` of an equal-width bin, however few images it holds.

    Guo et al., ICML 2017, eq. 5. Empty bins do not count.
    """
    bins = bin_samples(*top_label(probs, labels), n_bins, "equal-width")
    return (bins.outcome - bins.confidence).abs().max()  # 0 in an empty bin


def ks(probs: Tensor, labels: Tensor) -> Tensor:
    """Kolmogorov-Smirnov calibration error: the largest ``|sum_{c_i <= s} (c_i - correct_i)| / N`` over all s.

    Gupta et al., "Calibration of neural networks using splines", ICLR 2021, sec. 3: the distance between the cumulative
    distributions of confidence and accuracy, without bins. Equal confidences enter together, so the order of the images
    does not matter.
    """
    confidence, correct = top_label(probs, labels)
    levels, level = confidence.unique(return_inverse=True)  # sorted
    gaps = torch.zeros_like(levels).scatter_add(0, level, confidence - correct.double())
    return gaps.cumsum(0).abs().max() / len(confidence)


def oe(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Overconfidence error ``sum_b n_b/N conf_b max(conf_b - acc_b, 0)`` on equal-width bins; at most the ECE.

    Thulasidasan et al., "On mixup training", NeurIPS 2019, sec. 3 (OE).
    """
    return _one_sided(probs, labels, n_bins, 1)


def ue(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Underconfidence error ``sum_b n_b/N conf_b max(acc_b - conf_b, 0)``: the mirror image of :func:`oe`."""
    return _one_sided(probs, labels, n_bins, -1)


def _one_sided(probs: Tensor, labels: Tensor, n_bins: int, sign: int) -> Tensor:
    bins = bin_samples(*top_label(probs, labels), n_bins, "equal-width")
    gap = (sign * (bins.confidence - bins.outcome)).clamp(min=0)
    return (bins.count * bins.confidence * gap).sum() / bins.count.sum()


def l2_ce_debiased(probs: Tensor, labels: Tensor, n_bins: int = 15) -> Tensor:
    """Debiased L2 calibration error of the top label: the root of ``sum_b n_b/N ((conf_b - acc_b)^2 - acc_b (1 - acc_b) / (n_b - 1))``.

    Kumar et al., "Verified uncertainty calibration", NeurIPS 2019, sec. 5 (debiased estimator), on equal-mass bins. The
    subtrahend is what chance alone adds to the square of a bin's gap. The sum estimates the squared error without that bias
    and can be negative where the error is small; then the result is 0. A bin of one image, as where N < 2 n_bins, has no
    estimate of chance and keeps its square whole.
    """
    bins = bin_samples(*top_label(probs, labels), n_bins, "equal-mass")
    chance = bins.outcome * (1 - bins.outcome) / (bins.count - 1).clamp(min=1)
    squares = (bins.confidence - bins.outcome).square() - chance
    return ((bins.count * squares).sum() / bins.count.sum()).clamp(min=0).sqrt()


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
    confidence, predicted = probs.max(dim=1)
    return confidence.double().clamp(max=1), predicted == labels.long()  # check_probs lets a rounded 1 + 1e-7 pass


def class_bins(probs: Tensor, labels: Tensor, n_bins: int) -> Bins:
    """Equal-width bins of each ``p_k`` with the outcome ``1[y = k]``: fields (K, n_bins), float64.

    Args as for :func:`classwise_ece`. Some classes are binned at a time, so that memory does not grow with K.
    """
    check_n_bins(n_bins)
    check_probs(probs, labels)
    n, k = probs.shape
    fields = torch.empty(3, k, n_bins, dtype=torch.float64, device=probs.device)
    for classes in torch.arange(k, device=labels.device).split(max(1, BLOCK // n)):
        block = slice(int(classes[0]), int(classes[-1]) + 1)
        of_class = probs[:, block].T.contiguous().double().clamp(max=1)  # (classes, N)
        bins = bin_samples(of_class, labels == classes[:, None], n_bins, "equal-width")
        # Not a list of bins: small tensors that stay between large ones that go would hold the memory of all blocks.
        fields[:, block] = torch.stack([bins.count, bins.confidence, bins.outcome])
    return Bins(*fields)


def mean_gap(bins: Bins) -> Tensor:
    """``sum_b n_b/N |outcome_b - confidence_b|``: fields (..., n_bins) -> (...), float64 in [0, 1]."""
    share = bins.count / bins.count.sum(dim=-1, keepdim=True)
    return (share * (bins.outcome - bins.confidence).abs()).sum(dim=-1)
