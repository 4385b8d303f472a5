"""Opinion pools; weights of the logarithmic one against scipy's optimisers, and against logistic regression's own facts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

from csm.errors import InputError
from csm.reannotation.calibrators import Calibration, apply_calibration
from csm.reannotation.ensemble import ensemble_members, fit_ensemble, fit_ensemble_calibration, load_ensemble
from csm.reannotation.pools import POOLS, log_pool_weights

NONE = Calibration("none")


def sample(
    seed: int, rows: int = 300, classes: int = 4, noise: tuple[float, ...] = (0.7, 1.5, 6.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-posteriors (M, rows, classes) of members that see the truth through noise of their own, and labels drawn from the truth."""
    draw = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    said = [truth + one * torch.randn(rows, classes, generator=draw, dtype=torch.float64) for one in noise]
    return torch.stack(said).log_softmax(dim=2), labels


def loss(weights: np.ndarray, said: torch.Tensor, labels: torch.Tensor) -> float:
    """As the docstring says."""
    pooled = np.einsum("m,mik->ik", weights, said.numpy())
    of_label = np.take_along_axis(pooled, labels.numpy()[:, None], axis=1)
    return float(((weights - 1 / len(weights)) ** 2).sum() / 2 + (logsumexp(pooled, axis=1, keepdims=True) - of_label).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [(0.7, 1.5, 6.0), (0.5,), (1.0, 1.0, 1.0, 3.0, 9.0)])
def test_weights_are_those_of_scipy_s_optimiser(seed: int, noise: tuple[float, ...]) -> None:
    said, labels = sample(seed, rows=150, noise=noise)
    found = log_pool_weights(said, labels)
    bounds = [(0, None)] * len(noise)
    best = minimize(
        loss, np.full(len(noise), 0.5), (said, labels), "L-BFGS-B", bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9}
    )
    assert found.dtype == torch.float64
    assert loss(found.numpy(), said, labels) <= best.fun + 1e-9
    assert found.numpy() == pytest.approx(best.x, abs=1e-4)
    assert log_pool_weights(said, labels).equal(found)


def test_a_member_that_knows_the_wrong_way_gets_nothing() -> None:
    said, labels = sample(3)
    liar = (-said[0]).log_softmax(dim=1)
    found = log_pool_weights(torch.stack([said[0], liar, said[1]]), labels)
    assert found[1] == 0
    assert found[[0, 2]].numpy() == pytest.approx(
        log_pool_weights(said[:2], labels).numpy(), abs=0.01
    )  # the prior's mean differs
    alone = log_pool_weights(liar[None], labels)
    assert alone.tolist() == [0.0]


def test_what_is_seen_apart_adds_up_and_what_is_repeated_does_not() -> None:
    draw = torch.Generator().manual_seed(0)
    evidence = torch.randn(2, 4000, 3, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(evidence.sum(dim=0).softmax(dim=1), 1, generator=draw).squeeze(1)
    apart = log_pool_weights(evidence.log_softmax(dim=2), labels)
    assert apart.numpy() == pytest.approx([1, 1], abs=0.1)
    both = evidence.sum(dim=0).log_softmax(dim=1)
    repeated = log_pool_weights(torch.stack([both, both]), labels)
    assert repeated.sum().item() == pytest.approx(1, abs=0.1)
    assert repeated[0].item() == pytest.approx(repeated[1].item(), abs=1e-9)


def test_images_that_are_all_read_right_leave_finite_weights() -> None:
    labels = torch.arange(3).repeat(20)
    said = (5 * torch.nn.functional.one_hot(labels).double()).log_softmax(dim=1)
    found = log_pool_weights(torch.stack([said, said]), labels)
    assert (found > 0.5).all()
    assert (found < 5).all()


def test_a_probability_of_zero_is_no_accident() -> None:
    said, labels = sample(1)
    said[1, torch.arange(300), (labels + 1) % 4] = -torch.inf
    pool = POOLS["log"]
    weights = pool.fit(said, labels)
    assert weights.isfinite().all()
    assert pool.combine(weights, said).exp().sum(dim=1).numpy() == pytest.approx(np.ones(300))
    said[1, torch.arange(300), labels] = -torch.inf  # wrong each time: its veto must not count
    assert pool.fit(said, labels)[1] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", POOLS)
def test_pools_by_hand(name: str) -> None:
    said, _ = sample(2, rows=20)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    found = POOLS[name].combine(weights, said).numpy()
    probs, shares = said.exp().numpy(), weights.numpy()[:, None, None]
    if name == "linear":
        expected = (shares * probs).sum(axis=0)
    else:
        product = (probs**shares).prod(axis=0)
        expected = product / product.sum(axis=1, keepdims=True)
    assert np.exp(found) == pytest.approx(expected)


def test_an_ensemble_keeps_its_pool(tmp_path: Path) -> None:
    said, labels = sample(5)
    posteriors = {name: one.float() for name, one in zip(("near", "far", "blind"), said, strict=True)}
    calibrations = {"near": Calibration("temperature", temperature=1.3), "far": NONE, "blind": NONE}
    weights = fit_ensemble(tmp_path, posteriors, calibrations, labels, pool="log")
    found = load_ensemble(tmp_path)(list(posteriors.values()))
    pooled = sum(weights[name] * apply_calibration(posteriors[name], calibrations[name]).numpy() for name in posteriors)
    assert found.numpy() == pytest.approx(log_softmax(pooled, axis=1), abs=1e-5)
    assert ensemble_members(tmp_path) == ("near", "far", "blind")
    fit_ensemble(tmp_path, posteriors, calibrations, labels)
    assert load_ensemble(tmp_path).weights.sum().item() == pytest.approx(1)


def test_of_members_that_know_different_things_the_logarithmic_pool_is_better_and_needs_no_temperature() -> None:
    said, labels = sample(6, rows=600, noise=(1.5, 1.5, 1.5))
    posteriors = {str(number): one for number, one in enumerate(said)}
    calibrations = dict.fromkeys(posteriors, Calibration("temperature", temperature=1.0))
    linear, log = (fit_ensemble_calibration("temperature", posteriors, calibrations, labels, pool) for pool in ("linear", "log"))
    assert log.nll is not None
    assert linear.nll is not None
    assert log.nll < linear.nll - 0.005
    assert log.temperature == pytest.approx(1, abs=0.02)
    assert log.nll_before < log.nll < log.nll_before + 0.05


def test_an_unknown_pool_is_named(tmp_path: Path) -> None:
    said, labels = sample(0, rows=20, noise=(1.0,))
    for fit in (fit_ensemble, lambda *rest, **more: fit_ensemble_calibration("none", *rest[1:], **more)):
        with pytest.raises(InputError, match="pool: unknown 'geometric'; one of linear, log"):
            fit(tmp_path, {"a": said[0]}, {"a": NONE}, labels, pool="geometric")
