"""Which trials no other one beats."""

from collections.abc import Sequence

import numpy as np

from csm.metrics import METRICS


def pareto_front(values: Sequence[Sequence[float]], objectives: Sequence[str]) -> list[bool]:
    """Whether no other trial is as good in every objective and better in one; equal ones are all on the front.

    Args:
        values: of each trial, of each objective; one that is not finite is on no front and beats nobody.
        objectives: names in ``csm.metrics.METRICS``.
    """
    signs = np.array([-1.0 if METRICS[name].higher_is_better else 1.0 for name in objectives])
    losses = np.array(values, dtype=np.float64).reshape(-1, len(signs)) * signs  # (trials, objectives), lower is better
    measured = np.isfinite(losses).all(axis=1)
    losses[~measured] = np.inf
    return [
        bool(known and not ((losses <= loss).all(axis=1) & (losses < loss).any(axis=1)).any())
        for known, loss in zip(measured, losses, strict=True)
    ]
