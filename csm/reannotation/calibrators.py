"""From what an annotator stored to the soft label that a classifier learns; the calibration is applied when labels are read.

What a calibrator reads is the log-posterior (N, K) of a posterior head, or the shares of a pair head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import polars as pl
import torch
from torch import Tensor

from csm.errors import InputError
from csm.metrics.scores import check_logits
from csm.posthoc import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_isotonic,
    apply_temperature,
    fit_isotonic,
    fit_temperature,
    fit_vector,
)

if TYPE_CHECKING:  # it imports the ensemble, which imports this module
    from csm.reannotation.annotator import Annotator

FOLDS, FOLD_SEED = 5, 0
IMAGES_PER_CLASS = 10  # held-out images that a calibrator with numbers for each class needs
PAPER_SCALE = 4.0
Knots = tuple[tuple[float, float], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """How stored annotations become soft labels (``calibration.json``).

    Attributes:
        calibrator: a key of ``CALIBRATORS``.
        pair: labels give nothing outside the pair: those of a pair head, or of a posterior that is restricted to the pair.
        images: held-out real images it was fitted and measured on.
        nll_before, nll_after: NLL in nats on those images, without a calibrator and with this one; of the K classes for a
            posterior head, before a restriction to the pair; for a pair head that of two classes, the image's own against each
            other one. None if infinite, or nothing was held out.
        nll: as ``nll_after``, but each fifth of the images with the calibrator fitted on the rest: what ``choose`` compares.
        scale: s of ``scale``, ``fixed`` if it was given rather than fitted.
        temperature: T of ``temperature``.
        weights, biases: K of each, of ``vector``.
        knots: (score, probability) of ``isotonic``, for each class; for a pair head one list.
        note: why a fit fell back to another calibrator or kept a value.
    """

    calibrator: str
    pair: bool = False
    images: int = 0
    nll_before: float | None = None
    nll_after: float | None = None
    nll: float | None = None
    scale: float | None = None
    fixed: bool = False
    temperature: float | None = None
    weights: tuple[float, ...] = ()
    biases: tuple[float, ...] = ()
    knots: tuple[Knots, ...] = ()
    note: str = ""


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
    kind = find_calibrator(calibrator)
    if scale is not None and (calibrator != "scale" or not 0 < scale < float("inf")):
        raise InputError(f"calibrator {calibrator} with scale {scale:g}: scale must be > 0 and goes with calibrator scale alone")
    scores = shares if log_posterior is None else log_posterior
    if scores is None:
        if calibrator != "none":
            raise InputError(f"calibrator {calibrator} has nothing to be fitted on: this head takes calibrator none")
        return Calibration("none", pair=True)
    fit, nll = (kind.fit_share, _pair_nll) if log_posterior is None else (kind.fit_posterior, _posterior_nll)
    if fit is None:
        suited = [
            name for name, other in CALIBRATORS.items() if (other.fit_share if log_posterior is None else other.fit_posterior)
        ]
        knows = "only the pair" if log_posterior is None else "all classes"
        raise InputError(f"calibrator {calibrator} is not for a head that knows {knows}: take one of {', '.join(suited)}")
    if len(labels) < 2:
        raise InputError(f"calibration: {len(labels)} held-out images; expected at least 2: enlarge the validation split")
    if not scores.isfinite().all():
        raise InputError("calibration: an annotation of a held-out real image is not finite: check the encoder and the images")
    check_logits(scores, labels)

    note = _lacking(labels, scores.shape[1]) if kind.per_class else ""
    if note:
        instead = "scale" if log_posterior is None else "temperature"
        note = f"{calibrator} {note}: {instead} instead"
        fit = CALIBRATORS[instead].fit_share if log_posterior is None else CALIBRATORS[instead].fit_posterior
        assert fit is not None
    chosen = fit if scale is None else partial(_fixed_scale, scale)
    fitted = chosen(scores, labels)
    return replace(
        fitted,
        pair=pair or log_posterior is None,
        images=len(labels),
        nll_before=_finite(nll(scores, labels, Calibration("none")).mean()),
        nll_after=_finite(nll(scores, labels, fitted).mean()),
        nll=_finite(
            cross_fitted(
                labels,
                lambda rows: chosen(scores[rows], labels[rows]),
                lambda fold, rows: nll(scores[rows], labels[rows], fold),
            ).mean()
        ),
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


def apply_calibration(log_posterior: Tensor, calibration: Calibration) -> Tensor:
    """Calibrated log-posterior float64 (N, K), rows normalised, of a log-posterior (N, K); before a restriction to the pair.

    Raises:
        InputError: the calibrator is one of pair heads, or was fitted for another K.
    """
    apply = find_calibrator(calibration.calibrator).apply_posterior
    known = len(calibration.weights or calibration.knots)
    if apply is None or known not in (0, log_posterior.shape[1]):
        what = f"of {known} classes" if apply else "of a head that knows only the pair"
        raise InputError(
            f"calibration: {calibration.calibrator} {what} does not fit {log_posterior.shape[1]} classes: annotate again"
        )
    return apply(log_posterior.double(), calibration)


def refit(calibration: Calibration, log_posterior: Tensor, labels: Tensor) -> Calibration:
    """The same calibrator fitted on other held-out images of a posterior head, not measured."""
    fit = find_calibrator(calibration.calibrator).fit_posterior
    assert fit is not None
    return fit(log_posterior, labels)


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


def describe(calibration: Calibration) -> str:
    """What the labels are, in some words: "of all classes, at temperature 1.5, fitted on 300 real images"."""
    values = {"none": "as annotated", "vector": "by vector scaling", "isotonic": "by isotonic regression"}
    if calibration.scale is not None:
        values["scale"] = f"with scale s = {calibration.scale:.4g}"
    if calibration.temperature is not None:
        values["temperature"] = f"at temperature {calibration.temperature:.4g}"
    is_fitted = calibration.images > 0 and calibration.calibrator != "none" and not calibration.fixed
    fitted = f", fitted on {calibration.images} real images" if is_fitted else ""
    return f"of {'the two classes alone' if calibration.pair else 'all classes'}, {values[calibration.calibrator]}{fitted}"


def soft_labels(plan: pl.DataFrame, annotations: pl.DataFrame, n_classes: int, calibration: Calibration) -> pl.DataFrame:
    """Soft labels of annotated rows: columns mix_id and soft_label (Array(Float32, K), rows sum to 1).

    With a log-posterior: the calibrated posterior over all K classes, or, if ``calibration.pair``, its restriction to the pair.
    Without: class_a gets the calibrated share, class_b the rest.

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
    if missing == 0 and len(rows):
        log_posterior = apply_calibration(torch.from_numpy(rows["log_posterior"].to_numpy().copy()), calibration)
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
    if calibration.pair or missing:
        labels.zero_()
        labels[index, class_a] = torch.sigmoid(odds)
        labels[index, class_b] = torch.sigmoid(-odds)
    column = pl.Series("soft_label", labels.float().numpy(), dtype=pl.Array(pl.Float32, n_classes))
    return rows.select("mix_id").with_columns(column)


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


def find_calibrator(name: str) -> "CalibratorKind":
    """The entry ``name`` of ``CALIBRATORS``; ``InputError`` says which there are."""
    if name not in CALIBRATORS:
        raise InputError(f"calibrator {name} is unknown: take one of {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name]


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


def _other_shares(shares: Tensor, labels: Tensor) -> Tensor:
    """Those of another class than the image's own, float64 (N (K - 1),)."""
    return shares.double()[torch.ones_like(shares, dtype=torch.bool).scatter(1, labels[:, None], False)]


def _fit_none(scores: Tensor, labels: Tensor) -> Calibration:
    return Calibration("none")


def _fixed_scale(scale: float, shares: Tensor, labels: Tensor) -> Calibration:
    return Calibration("scale", scale=scale, fixed=True)


def _fit_scale(shares: Tensor, labels: Tensor) -> Calibration:
    """s of least mean of -log sigmoid(s (share - 0.5)); a temperature 1 / s of two logits, so in the same range."""
    off = _other_shares(shares, labels) - 0.5
    if (off > 0).all():
        note = f"every held-out image is on its own side of each pair, which does not tell s: kept at {PAPER_SCALE:g}"
        return Calibration("scale", scale=PAPER_SCALE, note=note)
    logits = torch.stack([off, torch.zeros_like(off)], dim=1)
    temperature = fit_temperature(logits, torch.zeros_like(off, dtype=torch.int64))
    return Calibration("scale", scale=1 / temperature, note=_at_the_end("s", temperature, 1 / temperature))


def _fit_temperature(log_posterior: Tensor, labels: Tensor) -> Calibration:
    own = log_posterior.gather(1, labels[:, None]).squeeze(1)
    if (own >= log_posterior.amax(dim=1)).all():
        return Calibration("temperature", temperature=1.0, note="every held-out image is right, which does not tell T: kept at 1")
    temperature = fit_temperature(log_posterior, labels)
    return Calibration("temperature", temperature=temperature, note=_at_the_end("T", temperature, temperature))


def _at_the_end(name: str, temperature: float, value: float) -> str:
    return f"{name} = {value:g} is the end of its range" if temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE) else ""


def _fit_vector(log_posterior: Tensor, labels: Tensor) -> Calibration:
    start = _fit_temperature(log_posterior, labels)
    if start.note:
        return start
    weights, biases = fit_vector(log_posterior.double().log_softmax(dim=1), labels, start.temperature or 1.0)
    return Calibration("vector", weights=tuple(weights.tolist()), biases=tuple(biases.tolist()))


def _fit_isotonic(log_posterior: Tensor, labels: Tensor) -> Calibration:
    odds = _log_odds(log_posterior.double())
    knots = tuple(fit_isotonic(odds[:, k], labels == k) for k in range(odds.shape[1]))
    return Calibration("isotonic", knots=knots)


def _fit_isotonic_share(shares: Tensor, labels: Tensor) -> Calibration:
    own = _other_shares(shares, labels)
    both = torch.cat([own, 1 - own])  # the other class of the pair has the rest, and is not the label
    return Calibration("isotonic", knots=(fit_isotonic(both, torch.cat([torch.ones_like(own), torch.zeros_like(own)])),))


def _log_odds(log_posterior: Tensor) -> Tensor:
    """log p / (1 - p) of each class, exact where p rounds to 1."""
    log_p = log_posterior.log_softmax(dim=1)
    top = log_p.argmax(dim=1, keepdim=True)
    rest = torch.log1p(-log_p.exp())
    others = log_p.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    return log_p - rest.scatter(1, top, others)


def _apply_none(log_posterior: Tensor, calibration: Calibration) -> Tensor:
    return log_posterior.log_softmax(dim=1)


def _apply_temperature(log_posterior: Tensor, calibration: Calibration) -> Tensor:
    assert calibration.temperature is not None
    return apply_temperature(log_posterior, calibration.temperature)


def _apply_vector(log_posterior: Tensor, calibration: Calibration) -> Tensor:
    weights, biases = (log_posterior.new_tensor(values) for values in (calibration.weights, calibration.biases))
    return (weights * log_posterior.log_softmax(dim=1) + biases).log_softmax(dim=1)


def _apply_isotonic(log_posterior: Tensor, calibration: Calibration) -> Tensor:
    """One class against the rest, renormalised (Zadrozny & Elkan 2002)."""
    odds = _log_odds(log_posterior)
    probs = torch.stack([apply_isotonic(odds[:, k], knots) for k, knots in enumerate(calibration.knots)], dim=1)
    return (probs / probs.sum(dim=1, keepdim=True)).log()


def _share_none(shares: Tensor, calibration: Calibration) -> Tensor:
    return shares.clamp(0, 1).logit()


def _share_scale(shares: Tensor, calibration: Calibration) -> Tensor:
    """Luo et al. 2025, reannotation."""
    assert calibration.scale is not None
    return calibration.scale * (shares - 0.5)


def _share_isotonic(shares: Tensor, calibration: Calibration) -> Tensor:
    return apply_isotonic(shares, calibration.knots[0]).logit()


class CalibratorKind(NamedTuple):
    """A registry entry; None where the calibrator is not for such a head.

    Attributes:
        fit_posterior: (log_posterior (N, K), labels) -> what was fitted.
        apply_posterior: (log_posterior float64 (N, K), fitted) -> calibrated log-posterior, rows normalised.
        fit_share: (shares (N, K) of ``held_out_shares``, labels) -> what was fitted.
        apply_share: (shares float64, any shape, fitted) -> log-odds of the class against the other one of the pair.
        per_class: it has numbers for each class, and needs held-out images of each.
    """

    fit_posterior: Callable[[Tensor, Tensor], Calibration] | None = None
    apply_posterior: Callable[[Tensor, Calibration], Tensor] | None = None
    fit_share: Callable[[Tensor, Tensor], Calibration] | None = None
    apply_share: Callable[[Tensor, Calibration], Tensor] | None = None
    per_class: bool = False


CALIBRATORS: dict[str, CalibratorKind] = {
    "none": CalibratorKind(_fit_none, _apply_none, _fit_none, _share_none),
    "scale": CalibratorKind(fit_share=_fit_scale, apply_share=_share_scale),
    "temperature": CalibratorKind(_fit_temperature, _apply_temperature),
    "vector": CalibratorKind(_fit_vector, _apply_vector, per_class=True),
    "isotonic": CalibratorKind(_fit_isotonic, _apply_isotonic, _fit_isotonic_share, _share_isotonic, per_class=True),
}
