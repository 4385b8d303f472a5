"""scikit-learn's bundled handwritten digits (UCI optdigits test set: 1,797 real 8x8 images of 43 writers), plain and made hard to read."""

import numpy as np

from csm.datasets.real import Amount, RealDataset, Seed, build, stratified_splits
from csm.errors import InputError

CLASS_NAMES = tuple("0123456789")


def digits(val: float = 0.2, test: float = 0.4, seed: Seed = 0) -> RealDataset:
    """The digits as they are, 8x8 grey levels 0..16 scaled to 0..255.

    Args:
        val, test: fraction of each class in the validation and test split.
        seed: of the split.
    """
    images, labels = _load()
    return build("digits", _to_uint8(images), labels, stratified_splits(labels, val, test, seed), CLASS_NAMES)


def digits_hard(
    val: float = 0.3,
    test: float = 0.4,
    seed: Seed = 0,
    max_shift: Amount = 1.0,
    blur: Amount = 0.6,
    noise: Amount = 0.14,
) -> RealDataset:
    """The same real digits made ambiguous: every image once, moved, blurred and covered with noise.

    Each image gets, in this order: a translation drawn uniformly from [-max_shift, max_shift] pixels on each axis (linear
    interpolation; a pixel whose source lies outside the image becomes black), a Gaussian blur of standard deviation ``blur``
    pixels, and independent Gaussian noise of standard deviation ``noise`` of full scale (clipped to the range). The draw depends on
    ``seed`` and the image only, not on its split.
    """
    from scipy.ndimage import gaussian_filter, shift

    images, labels = _load()
    generator = np.random.default_rng([seed, 20260])
    moves = generator.uniform(-max_shift, max_shift, size=(len(images), 2))
    moved = np.stack([shift(image, move, order=1) for image, move in zip(images, moves, strict=True)])
    blurred = gaussian_filter(moved, sigma=(0, blur, blur)) if blur > 0 else moved
    hard = np.clip(blurred + noise * generator.standard_normal(images.shape), 0.0, 1.0)
    return build("digits-hard", _to_uint8(hard), labels, stratified_splits(labels, val, test, seed), CLASS_NAMES)


def digits_degraded(
    val: float = 0.3,
    test: float = 0.4,
    seed: Seed = 0,
    blur: Amount = 0.9,
    contrast: float = 0.4,
    noise: Amount = 0.07,
    patch: int = 3,
) -> RealDataset:
    """The same real digits as a bad camera sees them: every image once, blurred, pale, with some noise and partly covered.

    Each image gets, in this order: a Gaussian blur of standard deviation ``blur`` pixels, a contrast drawn uniformly from [contrast, 1]
    that all its grey levels are multiplied by, independent Gaussian noise of standard deviation ``noise`` of full scale (clipped to the
    range), and a black square of ``patch`` x ``patch`` pixels at a place drawn uniformly from those inside the image. The draw depends on
    ``seed`` and the image only, not on its split.

    Raises:
        InputError: ``contrast`` is not in (0, 1], or ``patch`` is larger than the image.
    """
    from scipy.ndimage import gaussian_filter

    images, labels = _load()
    side = images.shape[1]
    if not 0 < contrast <= 1:
        raise InputError(f"data.contrast: expected more than 0 and at most 1, got {contrast:g}")
    if not 0 <= patch <= side:
        raise InputError(f"data.patch: expected 0 to {side}, the side of the images, got {patch}")
    generator = np.random.default_rng([seed, 20261])
    scales = generator.uniform(contrast, 1.0, size=(len(images), 1, 1))
    corners = generator.integers(0, side - patch + 1, size=(len(images), 2))
    blurred = gaussian_filter(images, sigma=(0, blur, blur)) if blur > 0 else images
    degraded = np.clip(scales * blurred + noise * generator.standard_normal(images.shape), 0.0, 1.0)
    for image, (top, left) in zip(degraded, corners, strict=True):
        image[top : top + patch, left : left + patch] = 0.0
    return build("digits-degraded", _to_uint8(degraded), labels, stratified_splits(labels, val, test, seed), CLASS_NAMES)


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images float64 (N, 8, 8) in [0, 1] and labels (N,)."""
    from sklearn.datasets import load_digits  # a second to import, which every worker would pay

    bundle = load_digits()
    return bundle.images / 16.0, bundle.target


def _to_uint8(images: np.ndarray) -> np.ndarray:
    """(N, H, W) in [0, 1] -> uint8 (N, H, W, 1)."""
    return np.rint(images * 255.0).astype(np.uint8)[..., None]
