"""From what an annotator stored to the soft label that a classifier learns; the calibration is applied when labels are read."""

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from csm.errors import InputError
from csm.reannotation.calibrators import Calibration, apply_calibration, find_calibrator
from csm.reannotation.truncation import Truncated, complete

CHUNK = 2**22  # probabilities in float64 at once: 32 MiB


def soft_labels(plan: pl.DataFrame, annotations: pl.DataFrame, n_classes: int, calibration: Calibration) -> pl.DataFrame:
    """Soft labels of annotated rows: columns mix_id and soft_label (Array(Float32, K), rows sum to 1).

    With a log-posterior: the calibrated posterior over all K classes, or, if ``calibration.pair``, its restriction to the pair.
    Without: class_a gets the calibrated share, class_b the rest. Of a truncated log-posterior that of ``complete``.

    Raises:
        InputError: an annotation is no number or no distribution, only some rows of the annotator have a log-posterior, or the
            calibration is one for other annotations.
    """
    rows = _annotated(plan, annotations)
    labels = torch.cat([_probabilities(part, n_classes, calibration).float() for part in _parts(rows, n_classes)])
    column = pl.Series("soft_label", labels.numpy(), dtype=pl.Array(pl.Float32, n_classes))
    return rows.select("mix_id").with_columns(column)


def sparse_labels(plan: pl.DataFrame, annotations: pl.DataFrame, n_classes: int, calibration: Calibration) -> pl.DataFrame:
    """As ``soft_labels``, from truncated annotations and without a number for every class.

    Returns:
        mix_id, classes (Array(UInt16, m)), probs (Array(Float32, m)) and rest (Float32), see ``SparseLabels``. m is that of the
        annotations, or 2 for labels of two classes, which are exact. Others are the label of ``soft_labels`` with the probability of
        the classes after the first m spread evenly over these: what it is after ``none`` and ``temperature``, and nearly after others.

    Raises:
        InputError: as ``soft_labels``.
    """
    rows = _annotated(plan, annotations)
    pair = calibration.pair or bool(rows["log_posterior"].null_count())
    top = 2 if pair else rows["classes"].to_numpy().shape[1]
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for part in _parts(rows, n_classes):
        labels = _probabilities(part, n_classes, calibration)
        classes = _pair(part) if pair else labels.topk(top, dim=1).indices
        rest = labels.scatter(1, classes, 0.0).sum(dim=1) / max(1, n_classes - top)
        found.append((classes, labels.gather(1, classes), rest))
    classes, probs, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows.select("mix_id").with_columns(
        pl.Series("classes", classes.numpy().astype(np.uint16), dtype=pl.Array(pl.UInt16, top)),
        pl.Series("probs", probs.float().numpy(), dtype=pl.Array(pl.Float32, top)),
        pl.Series("rest", rest.float().numpy()),
    )


def _annotated(plan: pl.DataFrame, annotations: pl.DataFrame) -> pl.DataFrame:
    """The annotated rows of ``plan``, each with its classes."""
    rows = annotations.join(plan.select("mix_id", "class_a", "class_b"), on="mix_id", how="inner")
    if not rows["lam_raw"].is_finite().fill_null(False).all():
        raise InputError("annotations: lam_raw is not finite in some rows: check the annotator and annotate again")
    missing = rows["log_posterior"].null_count()
    if missing not in (0, len(rows)):
        raise InputError(f"annotations: log_posterior is null in {missing} of {len(rows)} rows; expected all or none")
    return rows


def _parts(rows: pl.DataFrame, n_classes: int) -> Iterator[pl.DataFrame]:
    """``rows`` in slices of ``CHUNK`` probabilities; at least one, which is empty if they are."""
    size = max(1, CHUNK // n_classes)
    return (rows.slice(first, size) for first in range(0, max(1, len(rows)), size))


def _pair(rows: pl.DataFrame) -> torch.Tensor:
    """class_a and class_b, int64 (N, 2)."""
    return torch.from_numpy(rows.select("class_a", "class_b").to_numpy().astype(np.int64))


def _probabilities(rows: pl.DataFrame, n_classes: int, calibration: Calibration) -> torch.Tensor:
    """Soft labels float64 (N, K) of ``_annotated`` rows."""
    index = torch.arange(len(rows))
    class_a, class_b = _pair(rows).T
    known = len(rows) > 0 and rows["log_posterior"].null_count() == 0
    if known:
        log_posterior = apply_calibration(_log_posterior(rows, n_classes), calibration)
        labels = log_posterior.exp()
        odds = log_posterior[index, class_a] - log_posterior[index, class_b]  # nan if neither class has any mass
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
    if calibration.pair or not known:
        labels.zero_()
        labels[index, class_a] = torch.sigmoid(odds)
        labels[index, class_b] = torch.sigmoid(-odds)
    return labels


def _log_posterior(rows: pl.DataFrame, n_classes: int) -> torch.Tensor:
    """What the annotator said of every class, float32 (N, K), completed where it was truncated."""
    said = torch.from_numpy(rows["log_posterior"].to_numpy().copy())
    if "classes" not in rows.columns:
        return said
    classes = torch.from_numpy(rows["classes"].to_numpy().astype(np.int64))
    return complete(Truncated(classes, said, torch.from_numpy(rows["log_rest"].to_numpy().copy())), n_classes)
