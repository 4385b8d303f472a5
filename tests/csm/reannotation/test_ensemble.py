from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import softmax
from torch.nn.functional import cross_entropy

from csm import storage
from csm.errors import InputError
from csm.posthoc.ensemble import pool_weights
from csm.reannotation.calibration import fit_calibration, stratified_folds
from csm.reannotation.calibrators import Calibration, apply_calibration
from csm.reannotation.ensemble import fit_ensemble, fit_ensemble_calibration, load_ensemble

Sample = tuple[dict[str, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def members() -> Sample:
    """Three annotators (200, 4) that each see some of the classes well, one of them overconfident, and labels."""
    draw = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(200, 4, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    noise = torch.randn(3, 200, 4, generator=draw, dtype=torch.float64)
    seen = torch.tensor([[1.0, 1.0, 0.2, 0.2], [0.6, 0.6, 3.0, 3.0], [0.1, 0.1, 0.1, 0.1]])
    names = ("left", "right", "blind")
    return {
        name: (see * truth + off).log_softmax(dim=1).float() for name, see, off in zip(names, seen, noise, strict=True)
    }, labels


def calibrated(members: Sample) -> dict[str, Calibration]:
    return {name: fit_calibration("temperature", posterior, None, members[1]) for name, posterior in members[0].items()}


def likelihoods(seed: int, rows: int = 200, size: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.log(np.random.default_rng(seed).beta(0.8, 0.8, (rows, size))))


@pytest.mark.parametrize("seed", range(3))
def test_the_weights_are_those_of_greatest_likelihood(seed: int) -> None:
    logs = likelihoods(seed)
    found = pool_weights(logs)
    loss = lambda free: -np.log(np.exp(logs.numpy()) @ softmax(free)).mean()  # noqa: E731
    best = minimize(loss, np.zeros(3), method="BFGS")
    assert found.sum().item() == pytest.approx(1)
    assert (found >= 0).all()
    assert -(logs.exp() @ found).log().mean().item() == pytest.approx(best.fun, abs=2e-6)
    assert found.numpy() == pytest.approx(softmax(best.x), abs=0.01)


def test_the_likelihood_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = likelihoods(5, size=6)
    reached = []
    for steps in range(40):
        monkeypatch.setattr("csm.posthoc.ensemble.MAX_STEPS", steps)
        reached.append((logs.exp() @ pool_weights(logs)).log().mean().item())
    assert (np.diff(reached) >= -1e-15).all()
    assert reached[-1] > reached[0] + 1e-3


def test_a_member_that_is_never_better_gets_nothing_and_likelihoods_may_underflow() -> None:
    logs = torch.tensor([[-1.0, -2000.0], [-2000.0, -2001.0], [-0.5, -1.0]], dtype=torch.float64)
    assert pool_weights(logs).tolist() == pytest.approx([1, 0], abs=1e-3)
    assert pool_weights(logs[:, :1]).tolist() == [1.0]


def test_an_ensemble_is_the_weighted_mean_of_calibrated_members_and_comes_back(tmp_path: Path, members: Sample) -> None:
    posteriors, labels = members
    calibrations = {**calibrated(members), "right": fit_calibration("isotonic", posteriors["right"], None, labels)}
    weights = fit_ensemble(tmp_path, posteriors, calibrations, labels)
    assert list(weights) == list(posteriors)
    ensemble = load_ensemble(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["members.json", "weights.safetensors"]
    found = ensemble(list(posteriors.values()))
    expected = sum(weights[name] * apply_calibration(posteriors[name], calibrations[name]).exp().numpy() for name in posteriors)
    assert found.dtype == torch.float32
    assert found.exp().numpy() == pytest.approx(expected, abs=1e-6)
    parts = np.exp(-np.stack([out_of_fold(p, calibrations[n].calibrator, labels)[1] for n, p in posteriors.items()]))
    best = minimize(lambda free: -np.log(softmax(free) @ parts).mean(), np.zeros(3), method="BFGS")
    assert -np.log(np.array(list(weights.values())) @ parts).mean() == pytest.approx(best.fun, abs=2e-6)


def out_of_fold(posterior: torch.Tensor, calibrator: str, labels: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """Calibrated log-posterior and NLL of each image, by a calibrator that was fitted without its fold."""
    said = torch.empty(posterior.shape, dtype=torch.float64)
    for fold in stratified_folds(labels):
        rest = torch.tensor([i for i in range(len(labels)) if i not in set(fold.tolist())])
        fitted = fit_calibration(calibrator, posterior[rest], None, labels[rest])
        said[fold] = apply_calibration(posterior[fold], fitted)
    return said, cross_entropy(said, labels, reduction="none").numpy()


def test_a_member_whose_calibrator_overfits_does_not_win() -> None:
    draw = torch.Generator().manual_seed(3)
    truth = 2 * torch.randn(120, 4, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    noisy = truth + 3 * torch.randn(120, 4, generator=draw, dtype=torch.float64)
    posteriors = {"good": truth.log_softmax(dim=1).float(), "flexible": noisy.log_softmax(dim=1).float()}
    calibrations = {
        "good": fit_calibration("temperature", posteriors["good"], None, labels),
        "flexible": fit_calibration("isotonic", posteriors["flexible"], None, labels),
    }
    found = fit_ensemble_calibration("temperature", posteriors, calibrations, labels)
    assert found.nll < calibrations["flexible"].nll
    assert found.nll == pytest.approx(calibrations["good"].nll, abs=0.03)


def test_an_ensemble_moves_to_another_type_of_input_order_and_size(tmp_path: Path, members: Sample) -> None:
    posteriors, labels = members
    fit_ensemble(tmp_path, posteriors, calibrated(members), labels)
    ensemble = load_ensemble(tmp_path)
    all_, one = ensemble(list(posteriors.values())), ensemble([posterior[7:8].double() for posterior in posteriors.values()])
    assert torch.allclose(all_[7:8], one)


@pytest.mark.parametrize("calibrator", ["none", "temperature"])
def test_the_compared_nll_refits_members_and_weights_without_each_fold(tmp_path: Path, members: Sample, calibrator: str) -> None:
    posteriors, labels = members
    total = 0.0
    for number, fold in enumerate(stratified_folds(labels)):
        rest = torch.tensor([i for i in range(len(labels)) if i not in set(fold.tolist())])
        part = {name: posterior[rest] for name, posterior in posteriors.items()}
        _, pooled = stacked(tmp_path / str(number), part, labels[rest])
        final = fit_calibration(calibrator, pooled, None, labels[rest])
        ensemble = load_ensemble(tmp_path / str(number))
        said = ensemble([posterior[fold] for posterior in posteriors.values()])
        total += cross_entropy(apply_calibration(said, final), labels[fold], reduction="sum").item()
    found = fit_ensemble_calibration(calibrator, posteriors, calibrated(members), labels, pair=True)
    assert found.nll == pytest.approx(total / len(labels), abs=1e-5)
    assert found.pair
    _, pooled = stacked(tmp_path, posteriors, labels)
    assert found.nll_before == pytest.approx(cross_entropy(pooled, labels).item(), abs=1e-5)
    assert found.nll_after == pytest.approx(cross_entropy(apply_calibration(pooled, found), labels).item(), abs=1e-5)
    assert found.nll < min(calibration.nll for calibration in calibrated(members).values())


def stacked(directory: Path, posteriors: dict[str, torch.Tensor], labels: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """Weights, and the pool of members that were calibrated without the fold of each image."""
    weights = list(fit_ensemble(directory, posteriors, calibrated((posteriors, labels)), labels).values())
    probs = [out_of_fold(posterior, "temperature", labels)[0].exp() for posterior in posteriors.values()]
    return weights, sum(weight * part for weight, part in zip(weights, probs, strict=True)).log()


def test_members_must_know_all_classes(tmp_path: Path, members: Sample) -> None:
    posteriors, labels = members
    calibrations = {**calibrated(members), "right": Calibration("none", pair=True)}
    with pytest.raises(InputError, match="member right gives no probability outside the pair"):
        fit_ensemble(tmp_path, posteriors, calibrations, labels)
    with pytest.raises(InputError, match="member right gives no probability outside the pair"):
        fit_ensemble_calibration("temperature", posteriors, calibrations, labels)
    with pytest.raises(InputError, match="no members"):
        fit_ensemble(tmp_path, {}, {}, labels)


def test_a_damaged_ensemble_is_named(tmp_path: Path, members: Sample) -> None:
    fit_ensemble(tmp_path, members[0], calibrated(members), members[1])
    storage.write_json(tmp_path / "members.json", {"names": ["left"]})
    with pytest.raises(InputError, match=r"members\.json is not"):
        load_ensemble(tmp_path)
