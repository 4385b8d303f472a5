"""Fitting a calibrator on held-out real images, measuring it on images that the fit did not see, and choosing an annotator by that."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from csm.errors import InputError
from csm.metrics.scores import check_logits
from csm.reannotation.calibrators import CALIBRATORS, Calibration, apply_calibration, find_calibrator

if TYPE_CHECKING:  # it imports the ensemble, which imports this module
    from csm.reannotation.annotator import Annotator

FOLDS, FOLD_SEED = 5, 0
IMAGES_PER_CLASS = 10  # held-out images that a calibrator with numbers for each class needs
T = TypeVar("T")


def fit_calibration(
    calibrator: str,
    log_posterior: Tensor | None,
    shares: Tensor | None,
    labels: Tensor,
    *,
    scale: float | None = None,
    pair: bool = False,
) -> Calibration:
    """Fit a calibrator by NLL on real images that the annotator was not fitted on.

    ``vector`` and ``isotonic`` need 10 images of each class; with fewer, ``temperature`` (posterior heads) or ``scale`` (pair heads)
    is fitted instead, and ``note`` says so.

    Args:
        calibrator: a key of ``CALIBRATORS``.
        log_posterior: (N, K) of held-out real images, for posterior heads.
        shares: (N, K) from ``held_out_shares``, for pair heads. Both are None for a head that says nothing of a real image (ratio).
        labels: int64 (N,).
        scale: s of ``scale``; None: fitted.
        pair: labels are restricted to the pair.

    Raises:
        InputError: the calibrator is not one for such a head, there are fewer than 2 images, or an annotation is not finite.
    """
    find_calibrator(calibrator)
    if scale is not None and (calibrator != "scale" or not 0 < scale < float("inf")):
        raise InputError(f"calibrator {calibrator} with scale {scale:g}: scale must be > 0 and goes with calibrator scale alone")
    pair_head = log_posterior is None
    scores, nll, instead = (shares, _pair_nll, "scale") if pair_head else (log_posterior, _posterior_nll, "temperature")
    if scores is None:
        if calibrator != "none":
            raise InputError(f"calibrator {calibrator} has nothing to be fitted on: this head takes calibrator none")
        return Calibration("none", pair=True)
    fits = {name: fit for name, kind in CALIBRATORS.items() if (fit := kind.fit_share if pair_head else kind.fit_posterior)}
    if calibrator not in fits:
        knows = "only the pair" if pair_head else "all classes"
        raise InputError(f"calibrator {calibrator} is not for a head that knows {knows}: take one of {', '.join(fits)}")
    if len(labels) < 2:
        raise InputError(f"calibration: {len(labels)} held-out images; expected at least 2: enlarge the validation split")
    if not scores.isfinite().all():
        raise InputError("calibration: an annotation of a held-out real image is not finite: check the encoder and the images")
    check_logits(scores, labels)

    lacking = _lacking(labels, scores.shape[1]) if CALIBRATORS[calibrator].per_class else ""
    note = f"{calibrator} {lacking}: {instead} instead" if lacking else ""
    fit = partial(_keep_scale, scale) if scale is not None else fits[instead if lacking else calibrator]
    fitted = fit(scores, labels)
    folds = cross_fitted(
        labels,
        lambda rows: fit(scores[rows], labels[rows]),
        lambda fold, rows: nll(scores[rows], labels[rows], fold),
    )
    return replace(
        fitted,
        pair=pair or pair_head,
        images=len(labels),
        nll_before=_finite(nll(scores, labels, Calibration("none")).mean()),
        nll_after=_finite(nll(scores, labels, fitted).mean()),
        nll=_finite(folds.mean()),
        note="; ".join(filter(None, (note, fitted.note))),
    )


def held_out_shares(annotator: "Annotator", features: Mapping[str, Tensor], labels: Tensor, n_classes: int) -> Tensor:
    """What a pair head says of real images: float32 (N, K), entry (i, k) the share of image i's own class against class k.

    Args:
        annotator: one that knows only the pair.
        features: of the images by encoder, on the annotator's device.
        labels: int64 (N,), on the same device.
        n_classes: K.

    Returns:
        Not clipped; 1 where k is the image's own class.
    """
    shares = torch.ones(len(labels), n_classes, device=labels.device)
    for other in range(n_classes):
        rows = (labels != other).nonzero().squeeze(1)
        own = labels[rows]
        chosen = {name: feature[rows] for name, feature in features.items()}
        shares[rows, other], _ = annotator.annotate(
            chosen, own, torch.full_like(own, other), torch.ones_like(own, dtype=torch.float32)
        )
    return shares


def choose(candidates: Mapping[str, Calibration]) -> tuple[str, str]:
    """The annotator of least cross-fitted NLL on held-out real images, ties to the earlier one; and why, in one line.

    Raises:
        InputError: there is no candidate, or one gives nothing outside the pair: its NLL over K classes is infinite.
    """
    if not candidates:
        raise InputError("annotate.candidates is empty: name annotators to choose from")
    scores = {}
    for name, calibration in candidates.items():
        if calibration.pair or calibration.nll is None:
            raise InputError(
                f"annotate.candidates: {name} gives no probability outside the pair, so its NLL over all classes is infinite: "
                "leave it out, or name it as the annotator"
            )
        scores[name] = calibration.nll
    first, *others = sorted(scores, key=lambda name: scores[name])  # stable: ties stay in order
    reason = f"{first}: NLL {scores[first]:.3g} on {candidates[first].images} validation images"
    return first, reason + (f", next {others[0]} {scores[others[0]]:.3g}" if others else "")


def cross_fitted(labels: Tensor, fit: Callable[[Tensor], T], score: Callable[[T, Tensor], Tensor]) -> Tensor:
    """Scores float64 (N,) of images by what was fitted on the folds that they are not in; ``fit`` and ``score`` get row numbers."""
    scores = torch.empty(len(labels), dtype=torch.float64, device=labels.device)
    for held_out in stratified_folds(labels):
        rows = torch.ones_like(labels, dtype=torch.bool)
        rows[held_out] = False
        scores[held_out] = score(fit(rows.nonzero().squeeze(1)), held_out)
    return scores


def stratified_folds(labels: Tensor) -> Iterator[Tensor]:
    """Row numbers of the 5 folds (fewer if there are fewer rows): the images of each class in random order, dealt in turn."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(FOLD_SEED)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    for fold in range(min(FOLDS, len(labels))):
        yield order[fold::FOLDS]


def _keep_scale(scale: float, shares: Tensor, labels: Tensor) -> Calibration:
    return Calibration("scale", scale=scale, fixed=True)


def _lacking(labels: Tensor, n_classes: int) -> str:
    counts = torch.bincount(labels, minlength=n_classes)
    if counts.min() >= IMAGES_PER_CLASS:
        return ""
    return f"needs {IMAGES_PER_CLASS} held-out images of each class, class {int(counts.argmin())} has {int(counts.min())}"


def _finite(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None  # JSON has no infinity


def _posterior_nll(log_posterior: Tensor, labels: Tensor, calibration: Calibration) -> Tensor:
    return -apply_calibration(log_posterior, calibration).gather(1, labels[:, None]).squeeze(1)


def _pair_nll(shares: Tensor, labels: Tensor, calibration: Calibration) -> Tensor:
    """Mean over the other classes of -log p(own class), float64 (N,)."""
    apply = CALIBRATORS[calibration.calibrator].apply_share
    assert apply is not None
    nll = -torch.nn.functional.logsigmoid(apply(shares.double(), calibration))
    return nll.scatter(1, labels[:, None], 0.0).sum(dim=1) / (shares.shape[1] - 1)
