"""From what an annotator stored to the soft label that a classifier learns; the calibration is applied when labels are read."""

from dataclasses import dataclass

import polars as pl
import torch

from csm.errors import InputError
from csm.metrics import evaluate
from csm.posthoc import fit_temperature


@dataclass(frozen=True)
class Calibration:
    """How stored annotations become soft labels (``calibration.json``).

    Attributes:
        scale: s of the pair label sigmoid(s (lam_raw - 0.5)), for annotators that know only the pair; fixed, not fitted.
        temperature: T of softmax(log_posterior / T), for K-class annotators, fitted on held-out real images; None for the others.
        images: held-out images it was fitted on.
        nll_before, nll_after: NLL of the annotator on those images, in nats, at T = 1 and at ``temperature``.
    """

    scale: float
    temperature: float | None = None
    images: int = 0
    nll_before: float | None = None
    nll_after: float | None = None


def fit_calibration(log_posterior: torch.Tensor | None, labels: torch.Tensor, scale: float) -> Calibration:
    """Fit the temperature of a K-class annotator by NLL (Guo et al. 2017) on real images it was not trained on.

    Args:
        log_posterior: (N, K) of held-out real images, or None for an annotator that knows only the pair.
        labels: int64 (N,).
        scale: s for annotators that know only the pair.
    """
    if log_posterior is None:
        return Calibration(scale)
    temperature = fit_temperature(log_posterior, labels)
    before, after = (evaluate(log_posterior, labels, t, metrics=["nll"])["nll"] for t in (1.0, temperature))
    return Calibration(scale, temperature, len(labels), before, after)


def soft_labels(plan: pl.DataFrame, annotations: pl.DataFrame, n_classes: int, calibration: Calibration) -> pl.DataFrame:
    """Soft labels of annotated rows: columns mix_id and soft_label (Array(Float32, K), rows sum to 1).

    With a log-posterior: softmax(log_posterior / T) over all K classes. Without: class_a gets sigmoid(s (lam_raw - 0.5)), class_b the
    rest (Luo et al. 2025).

    Raises:
        InputError: an annotation is no number or no distribution, or only some rows of the annotator have a log-posterior.
    """
    rows = annotations.join(plan.select("mix_id", "class_a", "class_b"), on="mix_id", how="inner")
    if not rows["lam_raw"].is_finite().fill_null(False).all():
        raise InputError("annotations: lam_raw is not finite in some rows: check the annotator and annotate again")
    missing = rows["log_posterior"].null_count()
    if missing not in (0, len(rows)):
        raise InputError(f"annotations: log_posterior is null in {missing} of {len(rows)} rows; expected all or none")
    if missing == 0 and calibration.temperature is not None:
        posterior = torch.from_numpy(rows["log_posterior"].to_numpy().copy())  # (N, K)
        labels = (posterior.double() / calibration.temperature).softmax(dim=1)
        if labels.isnan().any():  # of NaN, of +inf, and of a row that is -inf throughout
            raise InputError("annotations: log_posterior is no distribution in some rows: check the annotator and annotate again")
    else:
        share = torch.sigmoid(calibration.scale * (torch.from_numpy(rows["lam_raw"].to_numpy().copy()).double() - 0.5))
        labels = torch.zeros(len(rows), n_classes, dtype=torch.float64)
        index = torch.arange(len(rows))
        labels[index, torch.tensor(rows["class_a"].to_list(), dtype=torch.int64)] = share
        labels[index, torch.tensor(rows["class_b"].to_list(), dtype=torch.int64)] = 1 - share
    column = pl.Series("soft_label", labels.float().numpy(), dtype=pl.Array(pl.Float32, n_classes))
    return rows.select("mix_id").with_columns(column)
