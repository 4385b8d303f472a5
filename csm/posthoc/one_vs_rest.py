"""Each class against the rest by itself, then renormalised (Zadrozny & Elkan 2002): isotonic regression and histogram binning.

Histogram binning: Zadrozny & Elkan, "Obtaining calibrated probability estimates from decision trees and naive Bayesian classifiers",
ICML 2001. A class without an image to fit on keeps the probability that temperature scaling gives it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csm.posthoc.isotonic import apply_isotonic, fit_isotonic
from csm.posthoc.temperature import apply_temperature, fit_scaled_temperature

HISTOGRAM_BINS = 15
PER_BIN = 10  # images that a bin of a histogram holds at least; with fewer images there are fewer bins


def log_odds(logits: Tensor) -> Tensor:
    """log p / (1 - p) of each class, (N, K), exact where p rounds to 1."""
    log_p = logits.log_softmax(dim=1)
    top = log_p.argmax(dim=1, keepdim=True)
    rest = torch.log1p(-log_p.exp())
    others = log_p.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return log_p - rest.scatter(1, top, others)


def isotonic_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """Knots of each class, over its log-odds."""
    odds, temperature = log_odds(logits), fit_scaled_temperature(logits, labels)[0]
    present = labels.unique().tolist()
    knots = [[list(knot) for knot in fit_isotonic(odds[:, k], labels == k)] if k in present else [] for k in range(odds.shape[1])]
    return {"knots": knots, "temperature": temperature}, _absent(present, odds.shape[1])


def apply_isotonic_values(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Log-probabilities float64 (N, K)."""
    odds, probs = log_odds(logits), apply_temperature(logits, values["temperature"]).exp()
    for k, knots in enumerate(values["knots"]):
        if knots:
            probs[:, k] = apply_isotonic(odds[:, k], knots)
    return _normalised(probs)


def histogram_values(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    """Edges and levels of each class: bins of equal mass over its log-odds, equal scores together.

    A level is the share of the class in its bin, kept away from 0 and 1 by 1 / (N + 2) as isotonic regression is.
    """
    odds, temperature, floor = log_odds(logits), fit_scaled_temperature(logits, labels)[0], 1 / (len(labels) + 2)
    present = labels.unique().tolist()
    bins = max(1, min(HISTOGRAM_BINS, len(labels) // PER_BIN))
    shares = torch.arange(1, bins, dtype=torch.float64, device=odds.device) / bins
    edges: list[list[float]] = []
    levels: list[list[float]] = []
    for k in range(odds.shape[1]):
        if k not in present:
            edges.append([])
            levels.append([])
            continue
        # Equal scores share an edge, so bins can be fewer, and the lowest or the highest one empty.
        cuts = odds[:, k].quantile(shares).unique() if bins > 1 else shares
        index = torch.bucketize(odds[:, k].contiguous(), cuts)
        count = torch.bincount(index, minlength=len(cuts) + 1)
        inside = torch.bincount(index, weights=(labels == k).double(), minlength=len(cuts) + 1)
        kept = count > 0
        edges.append(cuts[kept[:-1]].tolist())
        levels.append((inside[kept] / count[kept]).clamp(floor, 1 - floor).tolist())
    return {"edges": edges, "levels": levels, "temperature": temperature}, _absent(present, odds.shape[1])


def apply_histogram(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Log-probabilities float64 (N, K)."""
    odds, probs = log_odds(logits), apply_temperature(logits, values["temperature"]).exp()
    for k, (edges, levels) in enumerate(zip(values["edges"], values["levels"], strict=True)):
        if levels:
            index = torch.bucketize(odds[:, k].contiguous(), odds.new_tensor(edges))
            probs[:, k] = odds.new_tensor(levels)[index.clamp(max=len(levels) - 1)]
    return _normalised(probs)


def _normalised(probs: Tensor) -> Tensor:
    probs = probs.clamp(min=torch.finfo(probs.dtype).tiny)  # a class without knots may underflow
    return (probs / probs.sum(dim=1, keepdim=True)).log()


def _absent(present: list[int], n_classes: int) -> str:
    missing = n_classes - len(present)
    return f"{missing} of {n_classes} classes have no validation image: temperature scaling gives theirs" if missing else ""
