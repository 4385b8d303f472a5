"""Isotonic regression, one class against the rest.

Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fit_isotonic(scores: Tensor, outcomes: Tensor) -> tuple[tuple[float, float], ...]:
    """The increasing function of least squares, by pool-adjacent-violators, as knots (score, mean outcome) (Zadrozny & Elkan, 2002).

    Outcomes are kept away from 0 and 1 by 1 / (N + 2), the estimate of an event never seen in N trials (Laplace's rule).

    Args:
        scores: (N,), finite.
        outcomes: (N,), 0 or 1.

    Returns:
        Scores strictly increasing, outcomes not decreasing; for :func:`apply_isotonic`.
    """
    from sklearn.isotonic import IsotonicRegression  # a second to import, which every reader of labels would pay

    floor = 1 / (len(scores) + 2)
    fitted = IsotonicRegression(out_of_bounds="clip").fit(scores.double().cpu().numpy(), outcomes.double().cpu().numpy())
    means = fitted.y_thresholds_.clip(floor, 1 - floor)
    return tuple(zip(fitted.X_thresholds_.tolist(), means.tolist(), strict=True))


def apply_isotonic(scores: Tensor, knots: Sequence[tuple[float, float]]) -> Tensor:
    """Interpolate linearly between ``knots``, constant beyond the first and last; same shape as ``scores``, float64."""
    x, y = torch.tensor(knots, dtype=torch.float64, device=scores.device).T.contiguous()
    if len(x) == 1:
        return torch.where(scores.isnan(), torch.nan, y)
    right = torch.searchsorted(x, scores.double().contiguous()).clamp(1, len(x) - 1)
    share = ((scores - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return torch.lerp(y[right - 1], y[right], share)
