"""Calibrators by name: how the log-posterior of a posterior head, or the share of a pair head, becomes a probability."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from csm.errors import InputError
from csm.posthoc import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_isotonic,
    apply_temperature,
    fit_isotonic,
    fit_scaled_temperature,
    fit_temperature,
    fit_vector,
)
from csm.posthoc.one_vs_rest import log_odds

PAPER_SCALE = 4.0  # Luo et al. 2025
Knots = tuple[tuple[float, float], ...]


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


def find_calibrator(name: str) -> "CalibratorKind":
    """The entry ``name`` of ``CALIBRATORS``; ``InputError`` says which there are."""
    if name not in CALIBRATORS:
        raise InputError(f"calibrator {name} is unknown: take one of {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name]


def _other_shares(shares: Tensor, labels: Tensor) -> Tensor:
    """Those of another class than the image's own, float64 (N (K - 1),)."""
    return shares.double()[torch.ones_like(shares, dtype=torch.bool).scatter(1, labels[:, None], False)]


def _fit_none(scores: Tensor, labels: Tensor) -> Calibration:
    return Calibration("none")


def _fit_scale(shares: Tensor, labels: Tensor) -> Calibration:
    """s of least mean of -log sigmoid(s (share - 0.5)); a temperature 1 / s of two logits, so in the same range."""
    off = _other_shares(shares, labels) - 0.5
    if (off > 0).all():
        note = f"every held-out image is on its own side of each pair, which does not tell s: kept at {PAPER_SCALE:g}"
        return Calibration("scale", scale=PAPER_SCALE, note=note)
    logits = torch.stack([off, torch.zeros_like(off)], dim=1)
    temperature = fit_temperature(logits, torch.zeros_like(off, dtype=torch.int64))
    note = f"s = {1 / temperature:g} is the end of its range" if temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE) else ""
    return Calibration("scale", scale=1 / temperature, note=note)


def _fit_temperature(log_posterior: Tensor, labels: Tensor) -> Calibration:
    temperature, note = fit_scaled_temperature(log_posterior, labels)
    return Calibration("temperature", temperature=temperature, note=note)


def _fit_vector(log_posterior: Tensor, labels: Tensor) -> Calibration:
    start = _fit_temperature(log_posterior, labels)
    if start.note:
        return start
    weights, biases = fit_vector(log_posterior.double().log_softmax(dim=1), labels, start.temperature or 1.0)
    return Calibration("vector", weights=tuple(weights.tolist()), biases=tuple(biases.tolist()))


def _fit_isotonic(log_posterior: Tensor, labels: Tensor) -> Calibration:
    odds = log_odds(log_posterior.double())
    knots = tuple(fit_isotonic(odds[:, k], labels == k) for k in range(odds.shape[1]))
    return Calibration("isotonic", knots=knots)


def _fit_isotonic_share(shares: Tensor, labels: Tensor) -> Calibration:
    own = _other_shares(shares, labels)
    both = torch.cat([own, 1 - own])  # the other class of the pair has the rest, and is not the label
    return Calibration("isotonic", knots=(fit_isotonic(both, torch.cat([torch.ones_like(own), torch.zeros_like(own)])),))


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
    odds = log_odds(log_posterior)
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
