"""The methods against the baseline: means over seeds with their intervals, and which differences are more than chance."""

import polars as pl

from csm import statistics, tables
from csm.statistics import Runs, bootstrap, compare_draws, interval


def compare(runs: Runs, posthoc: str, baseline: str | None, n_bins: int, draws: int, seeds: int) -> pl.DataFrame:
    """Rows of the `comparison` table for predictions after ``posthoc``, methods in the order of ``runs``.

    Args:
        runs: as for ``csm.statistics.bootstrap``, which takes ``n_bins`` and ``draws`` too.
        posthoc: what was applied to them.
        baseline: the method that the others are compared with; None if it is not among them.
        seeds: of each method; with one, p-values would be about these classifiers and not about methods, and are null.
    """
    drawn = bootstrap(runs, n_bins=n_bins, draws=draws)
    rows = [
        (method, posthoc, metric, values.mean().item(), *interval(values, least=0.0))
        for method, metrics in drawn.items()
        for metric, values in metrics.items()
    ]
    means = pl.DataFrame(rows, schema=["method", "posthoc", "metric", "mean", "low", "high"], orient="row")
    against = compare_draws(drawn, baseline) if baseline else pl.DataFrame(schema=statistics.COMPARISON)
    if seeds == 1:
        against = against.with_columns(pl.lit(None, pl.Float64).alias(name) for name in ("p", "p_holm"))
    against = against.rename({"low": "difference_low", "high": "difference_high"})
    return means.join(against, on=["method", "metric"], how="left", maintain_order="left").select(list(tables.COMPARISON))
