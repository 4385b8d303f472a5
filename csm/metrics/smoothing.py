"""Smooth calibration error and reliability curve: a kernel in the place of bins.

Błasiok & Nakkiran, "Smooth ECE: principled reliability diagrams via kernel smoothing", ICLR 2024. Functions of confidence c are
smoothed with a Gaussian of bandwidth σ that is reflected at 0 and 1, so nothing leaks out of [0, 1]. On an even grid that is a
product in the cosine transform (the heat equation with closed ends), which costs the same whatever N and σ are.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from csm.metrics.binning import check_samples, unit_interval
from csm.metrics.calibration import top_label
from csm.metrics.scores import BLOCK

CELLS = 4096  # of the grid on [0, 1]; a quarter of the narrowest kernel
NARROWEST = 1e-3  # bandwidth below which there is nothing to see in a diagram
# Of a curve: least sum over images of exp(-(t - c)^2 / 2 σ^2) at which it is drawn; one image counts to 3 bandwidths.
LEAST_WEIGHT = 0.01


class SmoothReliability(NamedTuple):
    """Accuracy as a smooth function of confidence."""

    accuracy: Tensor  # float64 (G,) in [0, 1]; nan where no image is near
    density: Tensor  # float64 (G,), of the confidences; its integral over [0, 1] is 1
    bandwidth: float  # in units of confidence


def smooth_ece(probs: Tensor, labels: Tensor) -> Tensor:
    """Smooth ECE of the top label: ``∫ |1/N sum_i K_σ(t, c_i) (correct_i - c_i)| dt`` at the σ that equals this integral.

    Błasiok & Nakkiran, ICLR 2024: smECE_σ and its fixed point σ* (the integral falls as σ grows, so there is one). Where the
    fixed point is below 0.001, the value is that at σ = 0.001.

    Args:
        probs: (N, K), floating point, rows in [0, 1] that sum to 1.
        labels: (N,), integer, in 0..K-1.

    Returns:
        0-dim float64, a fraction in [0, 1]; between ``|mean(correct) - mean(c)|`` and ``mean |correct - c|``.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    confidence, correct = top_label(probs, labels)
    spectrum = _spectrum(_gather(confidence, (correct.double() - confidence) / len(confidence)))
    return _error(spectrum, _bandwidth(spectrum)).clamp(max=1)  # rounding


def smooth_reliability(confidence: Tensor, correct: Tensor, grid: Tensor) -> SmoothReliability:
    """Accuracy near each confidence t of ``grid``: ``t + sum_i K_σ(t, c_i) (correct_i - c_i) / sum_i K_σ(t, c_i)``.

    Błasiok & Nakkiran, ICLR 2024, with their bandwidth σ*. The gaps are smoothed, not the outcomes: so the distance between
    curve and diagonal, weighted by the density, has the smooth ECE as its integral (but for the clamp to [0, 1]), and
    confidences that stand alone do not bend the curve.

    Args:
        confidence: (..., N), floating point, in [0, 1]: N images, in leading dimensions several runs, which are pooled.
        correct: the same shape, bool or real, in [0, 1].
        grid: (G,), floating point, in [0, 1].

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    confidence, correct = check_samples(confidence, correct)
    gap = ((correct - confidence) / confidence.numel()).flatten()
    gaps = _spectrum(_gather(confidence.flatten(), gap))
    density = _spectrum(_gather(confidence.flatten(), torch.full_like(gap, 1 / len(gap))))
    bandwidth = _bandwidth(gaps)
    curve, heights = _curve(_smooth(gaps, bandwidth), _smooth(density, bandwidth), _nodes(_check_grid(grid)), bandwidth, len(gap))
    return SmoothReliability(curve, heights, bandwidth)


def smooth_reliability_band(
    confidence: Tensor, correct: Tensor, grid: Tensor, draws: int = 200, seed: int = 0, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Pointwise bootstrap band of :func:`smooth_reliability`: percentiles over resamples of the images, at the sample's bandwidth.

    Args:
        confidence, correct, grid: as there. An image is drawn with all its runs: more runs of the same images narrow the
            band only as far as they differ.
        draws: resamples, > 0.
        seed: of the resamples.
        level: share of the resampled curves inside, at each point of the grid, in (0, 1).

    Returns:
        Lower and upper edge, float64 (G,) each; nan where the curve is.

    Raises:
        ValueError: an argument is out of range or shapes do not match.
    """
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"draws must be > 0 and level in (0, 1), got {draws} and {level}")
    curve = smooth_reliability(confidence, correct, grid)
    confidence, correct = check_samples(confidence, correct)
    n, total = confidence.shape[-1], confidence.numel()
    left, share = _nodes(confidence)  # (..., N)
    image = torch.arange(n, device=confidence.device).expand_as(left)
    gap = (correct - confidence) / total
    values = [(1 - share) / total, share / total, gap * (1 - share), gap * share]
    rows = [left, left + 1, left + CELLS + 1, left + CELLS + 2]  # densities, below them gaps
    index = torch.stack([torch.cat([row.flatten() for row in rows]), image.flatten().repeat(4)])
    cells = torch.sparse_coo_tensor(
        index, torch.cat([v.flatten() for v in values]), (2 * (CELLS + 1), n), check_invariants=False
    ).coalesce()

    generator = torch.Generator().manual_seed(seed)
    nodes = _nodes(_check_grid(grid))
    curves = []
    for some in torch.arange(draws).split(max(1, BLOCK // max(n, 4 * CELLS))):
        drawn = torch.randint(n, (len(some), n), generator=generator).to(confidence.device)
        times = torch.zeros(drawn.shape, dtype=torch.float64, device=confidence.device)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        resampled = torch.sparse.mm(cells, times.T).T.reshape(len(some), 2, CELLS + 1)
        density, gaps = _smooth(_spectrum(resampled), curve.bandwidth).unbind(1)
        curves.append(_curve(gaps, density, nodes, curve.bandwidth, total)[0])
    tail = (1 - level) / 2
    low, high = torch.cat(curves).nanquantile(
        torch.tensor([tail, 1 - tail], dtype=torch.float64, device=confidence.device), dim=0
    )
    hidden = curve.accuracy.isnan()
    return low.masked_fill(hidden, math.nan), high.masked_fill(hidden, math.nan)


def _nodes(confidence: Tensor) -> tuple[Tensor, Tensor]:
    """The node of the grid left of each confidence (int64, 0..CELLS-1), and the share of the node on the right."""
    place = confidence * CELLS
    left = place.floor().clamp(max=CELLS - 1)
    return left.long(), place - left


def _gather(confidence: Tensor, values: Tensor) -> Tensor:
    """Sum ``values`` (N,) into the nodes on both sides of ``confidence`` (N,), by nearness: (CELLS + 1,)."""
    left, share = _nodes(confidence)
    sums = confidence.new_zeros(CELLS + 1).scatter_add(0, left, values * (1 - share))
    return sums.scatter_add(0, left + 1, values * share)


def _spectrum(sums: Tensor) -> Tensor:
    """Cosine transform of (..., CELLS + 1): the Fourier transform of what reflection at both ends makes of it, period 2."""
    inner, ends = sums[..., 1:-1], 2 * sums[..., [0, -1]]  # at an end, a mass and its image meet
    spectrum: Tensor = torch.fft.rfft(torch.cat([ends[..., :1], inner, ends[..., 1:], inner.flip(-1)], dim=-1))
    return spectrum


def _smooth(spectrum: Tensor, bandwidth: float) -> Tensor:
    """Density per unit of confidence at each node, (..., CELLS + 1)."""
    frequency = math.pi * torch.arange(CELLS + 1, dtype=torch.float64, device=spectrum.device)
    kernel = (-0.5 * (frequency * bandwidth).square()).exp()
    density: Tensor = CELLS * torch.fft.irfft(spectrum * kernel, n=2 * CELLS)
    return density[..., : CELLS + 1]


def _error(spectrum: Tensor, bandwidth: float) -> Tensor:
    return torch.trapezoid(_smooth(spectrum, bandwidth).abs(), dx=1 / CELLS)


def _bandwidth(spectrum: Tensor) -> float:
    """The bandwidth that equals its own error; at least NARROWEST."""

    def excess(bandwidth: float) -> float:
        return _error(spectrum, bandwidth).item() - bandwidth

    if excess(NARROWEST) <= 0:
        return NARROWEST
    return float(brentq(excess, NARROWEST, 2.0, xtol=1e-9))  # no error is above 1


def _curve(gaps: Tensor, density: Tensor, nodes: tuple[Tensor, Tensor], bandwidth: float, n: int) -> tuple[Tensor, Tensor]:
    """Accuracy (nan where no image is near) and density at the points of the grid, from both at the nodes."""
    left, share = nodes
    gap, height = (values[..., left] * (1 - share) + values[..., left + 1] * share for values in (gaps, density))
    weight = height * n * bandwidth * math.sqrt(2 * math.pi)
    accuracy = ((left + share) / CELLS + gap / height).clamp(0, 1)
    return accuracy.masked_fill(weight < LEAST_WEIGHT, math.nan), height.clamp(min=0)  # a transform's rounding


def _check_grid(grid: Tensor) -> Tensor:
    if grid.ndim != 1 or len(grid) == 0:
        raise ValueError(f"grid must have shape (G,), G > 0, got {tuple(grid.shape)}")
    return unit_interval(grid, "grid")
