"""Data whose true posterior is known: images drawn from class-conditional Gaussians, or mixtures of them, of a chosen overlap."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq

from csm import tables
from csm.datasets.digits import digits
from csm.datasets.real import RealDataset, build, with_truth
from csm.errors import InputError
from csm.generators import ExactGenerator
from csm.generators.gaussian_mixtures import GaussianMixtureGenerator, MixturesSpec
from csm.generators.gaussians import MAX_PIXELS, ROUNDING_VARIANCE, GaussianGenerator, GaussiansSpec, fit_gaussians
from csm.mixing import to_uint8
from csm.noise import mix_seeds

DIGITS = 10  # classes of scikit-learn's digits
REACH = 4.0  # standard deviations of every pixel that lie inside [-1, 1]
LOG_NOISE = (
    math.log(1e-6),
    math.log(1e4),
)  # of the variance of pixel noise in units of the mean variance of a pixel: what is searched
DRAWS = 8192  # images on which the overlap is set, of the same seeds for every data set
CHUNK = 16_384  # images drawn together
MAX_PARAMETERS = 2**27  # of all covariances: 1 GiB

_LAW, _LABEL, _IMAGE = 3, 4, 5  # keys of what is drawn from the data set's seed


@dataclass(frozen=True)
class Law:
    """K equally frequent classes of M Gaussians each; ``shape`` is (H, W, C).

    Float64: means (K, M, D), covariances (K, M, D, D), and the components' weights (K, M), rows of sum 1. D = C * H * W, channels first.
    """

    shape: tuple[int, int, int]
    means: torch.Tensor
    covariances: torch.Tensor
    weights: torch.Tensor

    def noisier(self, variance: float) -> "Law":
        """With independent noise of ``variance`` in every pixel."""
        noise = variance * torch.eye(self.means.shape[2], dtype=torch.float64)
        return replace(self, covariances=self.covariances + noise)

    def generator(self) -> ExactGenerator:
        """What draws from it and knows its posterior."""
        classes, components = self.weights.shape
        priors = torch.full((classes,), 1 / classes, dtype=torch.float64)
        if components == 1:
            return GaussianGenerator(GaussiansSpec(self.shape, classes), self.means[:, 0], self.covariances[:, 0], priors)
        spec = MixturesSpec(self.shape, classes, components)
        return GaussianMixtureGenerator(spec, self.means, self.covariances, self.weights, priors)


def gaussians(
    base: str = "digits",
    classes: int = 10,
    height: int = 8,
    width: int = 8,
    channels: int = 1,
    components: int = 1,
    bayes_accuracy: float = 0.88,
    mean_scale: float = 0.35,
    shared_covariance: float = 0.0,
    train: int = 2000,
    val: int = 500,
    test: int = 4000,
    seed: int = 0,
) -> RealDataset:
    """Images drawn from K Gaussians (or mixtures of ``components`` Gaussians) with equal priors, and the law itself as ``truth``.

    The law, in this order: means and covariances of ``base``; all means shrunk to their common mean by ``mean_scale``; each covariance
    blended with the mean one by ``shared_covariance``; independent pixel noise of one variance v added, by which alone the overlap is set:
    v is searched, on a fixed sample, until the Bayes classifier is right with probability ``bayes_accuracy`` (to 0.005); then one shift and
    one factor for all pixels put the mean +- 4 standard deviations of each into [-1, 1]. Pixels are rounded to 8 bits, and the truth's
    covariances hold the variance of that.

    Every image has a class, a component and a noise that are pure functions of (seed, split, index): the first images of a split are the
    same whatever its size and that of the others.

    Args:
        base: "digits", fitted to all of scikit-learn's digits (``fit_gaussians``; components are k-means clusters of a class): another
            ``seed`` draws other images from the same law. "synthetic", drawn from ``seed``, like the images: means are normal with
            variance 1, covariances have random axes and the variances 1/j of the j-th, scaled to a mean variance of 1.
        classes: of base "digits": up to 10, the digits 0, 1, ...; or a multiple of 10, each digit cut into as many k-means clusters.
        height, width, channels: of base "synthetic"; those of "digits" are 8, 8 and 1.
        components: M of each class.
        bayes_accuracy: accuracy of the true posterior's most probable class.
        mean_scale: 1 leaves the means as they are; the smaller, the more of the information is in the covariances.
        shared_covariance: 0 to 1; at 1 all covariances are equal, and for ``components`` 1 the true posterior is linear (LDA).
        train, val, test: images of each split.
        seed: of the images, and of the law of base "synthetic".

    Raises:
        InputError: a value is out of range, or no v gives ``bayes_accuracy``.
    """
    shape = (height, width, channels)
    _check_ranges(locals())
    if base == "digits" and shape != (8, 8, 1):
        raise InputError(f"data.base: digits are 8 x 8 x 1, got {height} x {width} x {channels}; set it to synthetic")
    if base == "digits" and classes > DIGITS and classes % DIGITS:
        raise InputError(
            f"data.classes: base digits has {DIGITS} digits: expected 2 to {DIGITS} or a multiple of it, got {classes}"
        )
    law = _digits_law(classes, components) if base == "digits" else _synthetic_law(classes, shape, components, seed)
    law = _fitting(_overlapping(_blended(law, mean_scale, shared_covariance), bayes_accuracy))
    counts = (train, val, test)
    drawn = [_draw(law.generator(), split, count, seed) for split, count in zip(tables.SPLITS, counts, strict=True)]
    images, labels = (torch.cat(parts).numpy() for parts in zip(*drawn, strict=True))
    names = [str(number) for number in range(classes)]
    dataset = build("gaussians", images, labels, np.repeat(tables.SPLITS, counts), names)
    return with_truth(dataset, law.noisier(ROUNDING_VARIANCE).generator())


_RANGES: dict[str, tuple[float, float]] = {
    "classes": (2, 1000),
    "height": (1, MAX_PIXELS),
    "width": (1, MAX_PIXELS),
    "channels": (1, 4),
    "components": (1, 8),
    "bayes_accuracy": (0, 1),
    "mean_scale": (0, 100),
    "shared_covariance": (0, 1),
    "train": (1, 10**8),
    "val": (1, 10**8),
    "test": (1, 10**8),
    "seed": (0, 2**31),
}


def _check_ranges(values: dict[str, Any]) -> None:
    """``InputError`` naming the argument of ``gaussians`` that is out of range."""
    if values["base"] not in ("digits", "synthetic"):
        raise InputError(f"data.base: expected digits or synthetic, got {values['base']!r}")
    for name, (low, high) in _RANGES.items():
        if not low <= values[name] <= high:
            raise InputError(f"data.{name}: expected {low:,} to {high:,}, got {values[name]}")
    size = math.prod(values["shape"])
    if size > MAX_PIXELS or values["classes"] * values["components"] * size**2 > MAX_PARAMETERS:
        raise InputError(
            f"data.height, data.width, data.channels: {values['classes'] * values['components']} covariances of images of {size} values "
            f"are too many numbers (at most {MAX_PIXELS:,} values, and {MAX_PARAMETERS:,} numbers): make the images smaller"
        )


def _digits_law(classes: int, components: int) -> Law:
    """Fitted to all 1,797 digits, or to those of the first ``classes``; see ``gaussians``."""
    data = digits()
    images, labels = (torch.cat(parts) for parts in zip(*(data.split(split) for split in tables.SPLITS), strict=True))
    images, labels = images[labels < classes], labels[labels < classes]
    labels = _clusters(images, labels, max(1, classes // DIGITS))
    fitted = fit_gaussians(images, _clusters(images, labels, components), classes * components)
    weights = fitted.priors.view(-1, components)
    return Law(
        data.info.shape,
        fitted.means.view(len(weights), components, -1),
        fitted.covariances.unflatten(0, weights.shape),
        weights / weights.sum(dim=1, keepdim=True),
    )


def _clusters(images: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
    """Labels int64 (N,) of each class cut into ``number`` k-means clusters: class k becomes number * k, number * k + 1, ..."""
    from sklearn.cluster import KMeans  # a second to import, which every worker would pay

    clusters = labels * number
    for label in labels.unique() if number > 1 else ():
        members = labels == label
        found = KMeans(number, n_init=4, random_state=0).fit_predict(images[members].flatten(1).double().numpy())
        clusters[members] += torch.from_numpy(found)
    return clusters


def _synthetic_law(classes: int, shape: tuple[int, int, int], components: int, seed: int) -> Law:
    """Drawn at random, see ``gaussians``; components of a class are equally frequent."""
    size = math.prod(shape)
    random = torch.Generator().manual_seed(int(mix_seeds(_LAW, [seed])[0]))
    means = torch.randn(classes, components, size, generator=random, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(classes, components, size, size, generator=random, dtype=torch.float64)).Q
    variances = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    covariances = (axes * (variances / variances.mean())) @ axes.mT
    return Law(shape, means, covariances, torch.full((classes, components), 1 / components, dtype=torch.float64))


def _blended(law: Law, mean_scale: float, shared_covariance: float) -> Law:
    """Means shrunk to their common mean, covariances blended with the mean covariance."""
    shares = law.weights / len(law.weights)
    centre = torch.einsum("km,kmd->d", shares, law.means)
    shared = torch.einsum("km,kmde->de", shares, law.covariances)
    covariances = (1 - shared_covariance) * law.covariances + shared_covariance * shared
    return replace(law, means=centre + mean_scale * (law.means - centre), covariances=covariances)


def _overlapping(law: Law, accuracy: float) -> Law:
    """``law`` with pixel noise of the variance at which its Bayes classifier has ``accuracy``."""
    unit = float(law.covariances.diagonal(dim1=2, dim2=3).mean())

    def excess(log_variance: float) -> float:
        return best_accuracy(law.noisier(unit * math.exp(log_variance)).generator()) - accuracy

    low, high = excess(LOG_NOISE[0]), excess(LOG_NOISE[1])
    if not low > 0 > high:
        raise InputError(
            f"data.bayes_accuracy: {accuracy:g} is out of reach, pixel noise takes these classes from {accuracy + low:.3f} to "
            f"{accuracy + high:.3f}: choose between, or change data.mean_scale (further apart: higher) or data.shared_covariance"
        )
    return law.noisier(unit * math.exp(brentq(excess, *LOG_NOISE, xtol=5e-3)))


def best_accuracy(truth: ExactGenerator, draws: int = DRAWS) -> float:
    """Accuracy of the Bayes classifier: the mean of max p(y | x) over ``draws`` fixed images, equally many of each class.

    Its standard error at 0.88 is 0.002, half of that of counting hits.
    """
    labels = np.arange(draws) * truth.n_classes // draws
    rows = max(
        1, CHUNK * 64 * 10 // (truth.n_classes * math.prod(truth.noise_shape))
    )  # log_posterior holds K * D numbers of each
    confidences = [
        truth.log_posterior(truth.sample(labels[part : part + rows].tolist(), list(range(part, min(part + rows, draws)))))
        .amax(dim=1)
        .exp()
        for part in range(0, draws, rows)
    ]
    return float(torch.cat(confidences).mean())


def _fitting(law: Law) -> Law:
    """Shifted and scaled, all pixels alike, so that the mean +- ``REACH`` standard deviations of every pixel lie inside [-1, 1]."""
    reach = REACH * law.covariances.diagonal(dim1=2, dim2=3).sqrt()
    low, high = float((law.means - reach).min()), float((law.means + reach).max())
    factor = 2 / (high - low)
    return replace(law, means=(law.means - (low + high) / 2) * factor, covariances=law.covariances * factor**2)


def _draw(law: ExactGenerator, split: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, H, W, C) and labels int64 (N,) of the first ``count`` of ``split``, each from a seed of its own."""
    where = (np.full(count, seed), np.full(count, tables.SPLITS.index(split)), np.arange(count))
    labels, seeds = mix_seeds(_LABEL, *where) % law.n_classes, mix_seeds(_IMAGE, *where)
    parts = []
    for start in range(0, count, CHUNK):
        rows = slice(start, start + CHUNK)
        parts.append(to_uint8(law.sample(labels[rows].tolist(), seeds[rows].tolist())).permute(0, 2, 3, 1))
    return torch.cat(parts), torch.from_numpy(labels)
