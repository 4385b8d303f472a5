"""Ensembles: a pool of calibrated annotators, see ``csm.reannotation.pools``.

The weights are those of greatest likelihood on held-out real images, each judged by calibrators that were fitted on others (stacking:
Wolpert, "Stacked generalization", 1992): else a member whose calibrator overfits would get all the weight. A linear pool of calibrated
members is itself a little too uncertain (Ranjan & Gneiting, "Combining probability forecasts", 2010), so a pool is calibrated again, in the
same way; the temperature of a logarithmic one is part of its weights already, and comes out near 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from csm import storage
from csm.errors import InputError
from csm.parameters import check_name
from csm.reannotation.calibration import cross_fitted, fit_calibration, stratified_folds
from csm.reannotation.calibrators import Calibration, apply_calibration, refit
from csm.reannotation.pools import POOLS, Pool


@dataclass(frozen=True)
class _Members:
    names: tuple[str, ...]
    calibrations: tuple[Calibration, ...]
    pool: str = "linear"


class Ensemble(nn.Module):
    """The pool; ``weights`` float64 (M,), ``calibrations`` those of the members in the same order."""

    weights: Tensor

    def __init__(self, weights: Tensor, calibrations: Sequence[Calibration], pool: Pool) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.calibrations, self.pool = tuple(calibrations), pool

    def forward(self, posteriors: Sequence[Tensor]) -> Tensor:
        """Pooled log-posterior float32 (N, K) of M raw log-posteriors (N, K) in the order of the members."""
        return self.pool.combine(self.weights, _calibrated(posteriors, self.calibrations)).float()


def fit_ensemble(
    directory: Path,
    posteriors: Mapping[str, Tensor],
    calibrations: Mapping[str, Calibration],
    labels: Tensor,
    pool: str = "linear",
) -> dict[str, float]:
    """Fit the weights of a pool and keep what ``load_ensemble`` needs in ``directory``.

    Args:
        directory: of the ensemble.
        posteriors: raw log-posterior (N, K) of held-out real images by each member, in the order of the members.
        calibrations: of the members.
        labels: int64 (N,).
        pool: a key of ``POOLS``.

    Returns:
        The weight of each member.

    Raises:
        InputError: there is no member, one gives nothing outside the pair, or the pool is unknown.
    """
    _check_members(posteriors, calibrations)
    check_name("pool", pool, POOLS)
    fixed = [calibrations[name] for name in posteriors]
    weights = POOLS[pool].fit(_out_of_fold(torch.stack(list(posteriors.values())), fixed, labels), labels)
    storage.write_json(directory / "members.json", asdict(_Members(tuple(posteriors), tuple(fixed), pool)))
    storage.write_tensors(directory / "weights.safetensors", {"weights": weights})
    return dict(zip(posteriors, weights.tolist(), strict=True))


def load_ensemble(directory: Path) -> Ensemble:
    """Return what ``fit_ensemble`` kept."""
    members = storage.read_record(directory / "members.json", _Members)
    weights = storage.read_tensors(directory / "weights.safetensors")["weights"]
    return Ensemble(weights, members.calibrations, POOLS[members.pool])


def ensemble_members(directory: Path) -> tuple[str, ...]:
    """Names of the members of the ensemble that ``fit_ensemble`` kept."""
    return storage.read_record(directory / "members.json", _Members).names


def fit_ensemble_calibration(
    calibrator: str,
    posteriors: Mapping[str, Tensor],
    calibrations: Mapping[str, Calibration],
    labels: Tensor,
    pool: str = "linear",
    *,
    pair: bool = False,
) -> Calibration:
    """``fit_calibration`` of the pool; its cross-fitted ``nll`` fits members, weights and ``calibrator`` anew without each fold.

    Arguments as for ``fit_ensemble`` and ``fit_calibration``.

    Raises:
        InputError: as these.
    """
    _check_members(posteriors, calibrations)
    check_name("pool", pool, POOLS)
    raw, fixed = torch.stack(list(posteriors.values())), [calibrations[name] for name in posteriors]

    def stack(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, and the pooled log-posterior of ``rows``, by members that were calibrated on others of them."""
        calibrated = _out_of_fold(raw[:, rows], fixed, labels[rows])
        weights = POOLS[pool].fit(calibrated, labels[rows])
        return weights, POOLS[pool].combine(weights, calibrated)

    _, pooled = stack(torch.arange(len(labels), device=labels.device))
    fitted = fit_calibration(calibrator, pooled, None, labels, pair=pair)

    def fit(rows: Tensor) -> tuple[list[Calibration], Tensor, Calibration]:
        weights, pooled = stack(rows)
        members = [refit(one, posterior[rows], labels[rows]) for one, posterior in zip(fixed, raw, strict=True)]
        return members, weights, refit(fitted, pooled, labels[rows])

    def score(fold: tuple[list[Calibration], Tensor, Calibration], rows: Tensor) -> Tensor:
        members, weights, last = fold
        pooled = POOLS[pool].combine(weights, _calibrated(list(raw[:, rows]), members))
        return -apply_calibration(pooled, last).gather(1, labels[rows, None]).squeeze(1)

    return replace(fitted, nll=cross_fitted(labels, fit, score).mean().item())


def _check_members(posteriors: Mapping[str, Tensor], calibrations: Mapping[str, Calibration]) -> None:
    if not posteriors:
        raise InputError("ensemble: no members: name annotators that know all classes")
    for name in posteriors:
        if calibrations[name].pair:
            raise InputError(
                f"ensemble: member {name} gives no probability outside the pair: name annotators that know all classes"
            )


def _calibrated(posteriors: Sequence[Tensor], calibrations: Sequence[Calibration]) -> Tensor:
    """Calibrated log-posteriors float64 (M, N, K)."""
    return torch.stack([apply_calibration(*member) for member in zip(posteriors, calibrations, strict=True)])


def _out_of_fold(posteriors: Tensor, calibrations: Sequence[Calibration], labels: Tensor) -> Tensor:
    """As ``_calibrated``, of (M, N, K), but each image by calibrators fitted on the folds that it is not in."""
    result = torch.empty_like(posteriors, dtype=torch.float64)
    for held_out in stratified_folds(labels):
        rows = torch.ones_like(labels, dtype=torch.bool)
        rows[held_out] = False
        refitted = [refit(one, posterior[rows], labels[rows]) for one, posterior in zip(calibrations, posteriors, strict=True)]
        result[:, held_out] = _calibrated(list(posteriors[:, held_out]), refitted)
    return result
