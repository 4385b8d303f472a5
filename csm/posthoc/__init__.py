"""Post-hoc calibration by name: what is fitted on held-out logits after training, and gives calibrated log-probabilities.

Each method is a file; a fit sees the logits and labels that it is given and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from csm.errors import InputError
from csm.metrics.scores import check_logits
from csm.parameters import check_name
from csm.posthoc.affine import apply_dirichlet, apply_matrix, dirichlet_values, matrix_values
from csm.posthoc.ensemble import ensemble_values, mix_temperatures
from csm.posthoc.isotonic import apply_isotonic, fit_isotonic
from csm.posthoc.one_vs_rest import apply_histogram, apply_isotonic_values, histogram_values, isotonic_values
from csm.posthoc.temperature import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply_temperature,
    fit_scaled_temperature,
    fit_temperature,
    scale_by_temperature,
    temperature_values,
)
from csm.posthoc.vector import apply_vector, fit_vector, vector_values


@dataclass(frozen=True)
class Posthoc:
    """What a method of ``POSTHOC`` fitted. Its dictionary is JSON, which ``csm.storage.read_record`` reads back.

    Attributes:
        name: a key of ``POSTHOC``.
        values: numbers, and (nested) lists of numbers; which they are depends on the method (``temperature`` has "temperature").
        note: what the images could not tell, and what was done about it.
    """

    name: str
    values: dict[str, Any]
    note: str = ""


class PosthocKind(NamedTuple):
    """A registry entry.

    Attributes:
        fit: (logits float64 (N, K), labels int64 (N,)) -> (values, note).
        apply: (logits float64 (N, K), values) -> log-probabilities float64 (N, K).
        images: images that it takes to fit at all.
        per_class: of ``values``, the one that has K entries, by which logits of another K are refused.
    """

    fit: Callable[[Tensor, Tensor], tuple[dict[str, Any], str]]
    apply: Callable[[Tensor, Mapping[str, Any]], Tensor]
    images: int = 1
    per_class: str = ""


def fit_posthoc(name: str, logits: Tensor, labels: Tensor, where: str = "") -> Posthoc:
    """Fit ``POSTHOC[name]`` on held-out images.

    Args:
        name: a key of ``POSTHOC``.
        logits: (N, K), floating point, finite; K >= 2.
        labels: (N,), integer, in 0..K-1.
        where: the run or the dotted key that an error is about.

    Raises:
        InputError: the name is unknown, an argument is out of range, or there are fewer images than the method needs.
    """
    check_name(where or "posthoc", name, POSTHOC)
    prefix = f"{where}: " if where else ""
    kind = POSTHOC[name]
    if len(labels) < kind.images:
        raise InputError(
            f"{prefix}posthoc {name} needs at least {kind.images} validation images, got {len(labels)}: enlarge the validation split"
        )
    try:
        check_logits(logits, labels)
    except ValueError as error:
        raise InputError(f"{prefix}posthoc {name}: {error}") from None
    values, note = kind.fit(logits.detach().double(), labels.long())
    return Posthoc(name, values, note)


def apply_posthoc(logits: Tensor, posthoc: Posthoc) -> Tensor:
    """Calibrated log-probabilities float64 (N, K) of logits (N, K).

    Rows are normalised, and finite for finite float32 logits: every method works on log-probabilities, or keeps probabilities away
    from 0 itself (``isotonic`` and ``histogram``, by the number of images they were fitted on).

    Raises:
        InputError: the method is unknown, or was fitted for another K.
    """
    check_name("posthoc", posthoc.name, POSTHOC)
    kind = POSTHOC[posthoc.name]
    if kind.per_class and len(posthoc.values[kind.per_class]) != logits.shape[1]:
        fitted = len(posthoc.values[kind.per_class])
        raise InputError(
            f"posthoc {posthoc.name} was fitted for {fitted} classes, got logits of {logits.shape[1]}: evaluate again"
        )
    return kind.apply(logits.double(), posthoc.values)


def _fit_none(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], str]:
    return {}, ""


def _apply_none(logits: Tensor, values: Mapping[str, Any]) -> Tensor:
    return logits.log_softmax(dim=1)


POSTHOC: dict[str, PosthocKind] = {
    "none": PosthocKind(_fit_none, _apply_none),
    "temperature": PosthocKind(temperature_values, scale_by_temperature),
    "ensemble-temperature": PosthocKind(ensemble_values, mix_temperatures),
    "vector": PosthocKind(vector_values, apply_vector, images=10, per_class="weights"),
    "matrix": PosthocKind(matrix_values, apply_matrix, images=10, per_class="matrix"),
    "dirichlet": PosthocKind(dirichlet_values, apply_dirichlet, images=10, per_class="matrix"),
    "isotonic": PosthocKind(isotonic_values, apply_isotonic_values, images=10, per_class="knots"),
    "histogram": PosthocKind(histogram_values, apply_histogram, images=10, per_class="levels"),
}

__all__ = [
    "MAX_TEMPERATURE",
    "MIN_TEMPERATURE",
    "POSTHOC",
    "Posthoc",
    "PosthocKind",
    "apply_isotonic",
    "apply_posthoc",
    "apply_temperature",
    "fit_isotonic",
    "fit_posthoc",
    "fit_scaled_temperature",
    "fit_temperature",
    "fit_vector",
]
