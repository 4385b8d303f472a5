"""From what an annotator stored to the soft label that a classifier learns; the calibration is applied when labels are read."""

import polars as pl
import torch

from csm.errors import InputError
from csm.reannotation.calibrators import Calibration, apply_calibration, find_calibrator


def soft_labels(plan: pl.DataFrame, annotations: pl.DataFrame, n_classes: int, calibration: Calibration) -> pl.DataFrame:
    """Soft labels of annotated rows: columns mix_id and soft_label (Array(Float32, K), rows sum to 1).

    With a log-posterior: the calibrated posterior over all K classes, or, if ``calibration.pair``, its restriction to the pair.
    Without: class_a gets the calibrated share, class_b the rest. A pair of one class twice, as real images have it, leaves that class all.

    Raises:
        InputError: an annotation is no number or no distribution, only some rows of the annotator have a log-posterior, or the
            calibration is one for other annotations.
    """
    rows = annotations.join(plan.select("mix_id", "class_a", "class_b"), on="mix_id", how="inner")
    if not rows["lam_raw"].is_finite().fill_null(False).all():
        raise InputError("annotations: lam_raw is not finite in some rows: check the annotator and annotate again")
    missing = rows["log_posterior"].null_count()
    if missing not in (0, len(rows)):
        raise InputError(f"annotations: log_posterior is null in {missing} of {len(rows)} rows; expected all or none")
    index = torch.arange(len(rows))
    class_a, class_b = (torch.tensor(rows[name].to_list(), dtype=torch.int64) for name in ("class_a", "class_b"))
    is_one = class_a == class_b
    if missing == 0 and len(rows):
        log_posterior = apply_calibration(torch.from_numpy(rows["log_posterior"].to_numpy().copy()), calibration)
        labels = log_posterior.exp()
        odds = log_posterior[index, class_a] - log_posterior[index, class_b]  # nan if neither class has any mass
        odds[is_one] = 0
        if labels.isnan().any() or (
            calibration.pair and odds.isnan().any()
        ):  # of NaN, of +inf, and of a row that is -inf throughout
            raise InputError("annotations: log_posterior is no distribution in some rows: check the annotator and annotate again")
    else:
        apply = find_calibrator(calibration.calibrator).apply_share
        if apply is None:
            raise InputError(
                f"annotations: log_posterior is null, which calibrator {calibration.calibrator} needs: annotate again"
            )
        labels = torch.empty(len(rows), n_classes, dtype=torch.float64)
        odds = apply(torch.from_numpy(rows["lam_raw"].to_numpy().copy()).double(), calibration)
    if calibration.pair or missing:
        labels.zero_()
        labels[index, class_a] = torch.sigmoid(odds)
        labels[index, class_b] = torch.sigmoid(-odds)
        labels[index[is_one], class_a[is_one]] = 1
    column = pl.Series("soft_label", labels.float().numpy(), dtype=pl.Array(pl.Float32, n_classes))
    return rows.select("mix_id").with_columns(column)
