from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from csm import storage
from csm.errors import InputError
from csm.posthoc import POSTHOC, Posthoc, apply_posthoc, fit_posthoc, fit_scaled_temperature, fit_temperature, fit_vector
from csm.posthoc.affine import MOST_CLASSES, fit_affine
from csm.posthoc.one_vs_rest import log_odds

NESTED = ("temperature", "ensemble-temperature", "vector", "matrix", "dirichlet")  # each can say what temperature scaling says


def sample(n: int = 400, k: int = 4, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Overconfident logits: the truth is their softmax at temperature ``scale``."""
    draw = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, k, generator=draw, dtype=torch.float64)
    return scale * logits, torch.multinomial(logits.softmax(dim=1), 1, generator=draw).squeeze(1)


def nll(log_probs: Tensor, labels: Tensor) -> float:
    return -log_probs.gather(1, labels[:, None]).mean().item()


@pytest.mark.parametrize("name", POSTHOC)
def test_what_comes_out_is_a_log_distribution(name: str) -> None:
    logits, labels = sample()
    fitted = fit_posthoc(name, logits, labels)
    wild = torch.cat([logits, torch.tensor([[1e4, -1e4, 0.0, 0.0], [3e38, -3e38, 0.0, 1.0], [0.0] * 4]).double()])
    log_probs = apply_posthoc(wild.float(), fitted)
    assert log_probs.dtype == torch.float64
    assert bool(log_probs[:-2].isfinite().all())
    assert bool((log_probs <= 1e-12).all())
    assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(len(wild), dtype=torch.float64))


@pytest.mark.parametrize("name", POSTHOC)
def test_what_was_fitted_survives_a_file(name: str, tmp_path: Path) -> None:
    logits, labels = sample(100)
    fitted = fit_posthoc(name, logits, labels)
    storage.write_json(tmp_path / "posthoc.json", asdict(fitted))
    again = storage.read_record(tmp_path / "posthoc.json", Posthoc)
    assert torch.equal(apply_posthoc(logits, again), apply_posthoc(logits, fitted))


@pytest.mark.parametrize("name", POSTHOC)
def test_a_row_may_be_shifted(name: str) -> None:
    logits, labels = sample(200)
    moved = logits + torch.arange(200, dtype=torch.float64)[:, None]
    before, after = (apply_posthoc(z, fit_posthoc(name, z, labels)) for z in (logits, moved))
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in POSTHOC if name != "none"])
def test_overconfidence_is_mended_on_other_images(name: str) -> None:
    logits, labels = sample(2000)
    fresh, truth = sample(2000, seed=1)
    fitted = fit_posthoc(name, logits, labels)
    assert nll(apply_posthoc(fresh, fitted), truth) < nll(fresh.log_softmax(dim=1), truth) - 0.2
    assert nll(apply_posthoc(fresh, fitted), truth) < nll((fresh / 3).log_softmax(dim=1), truth) + 0.03


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("seed", range(3))
def test_what_can_say_the_same_is_no_worse_where_it_was_fitted(name: str, seed: int) -> None:
    logits, labels = sample(150, seed=seed)
    temperature = nll((logits / fit_temperature(logits, labels)).log_softmax(dim=1), labels)
    assert nll(apply_posthoc(logits, fit_posthoc(name, logits, labels)), labels) <= temperature + 1e-6


def test_none_changes_nothing() -> None:
    logits, labels = sample()
    assert torch.equal(apply_posthoc(logits, fit_posthoc("none", logits, labels)), logits.log_softmax(dim=1))


def test_temperature_is_in_the_values() -> None:
    logits, labels = sample(4000)
    assert fit_posthoc("temperature", logits, labels).values["temperature"] == pytest.approx(3.0, rel=0.1)


def test_ensemble_temperature_finds_a_mixture() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(6_000, 3, generator=draw, dtype=torch.float64)
    truth = 0.7 * logits.softmax(dim=1) + 0.3 / 3  # what temperature alone cannot say
    labels = torch.multinomial(truth, 1, generator=draw).squeeze(1)
    fitted = fit_posthoc("ensemble-temperature", logits, labels)
    assert sum(fitted.values["weights"]) == pytest.approx(1.0)
    found = apply_posthoc(logits, fitted).exp()
    assert (found - truth).abs().sum(dim=1).mean() < 0.03
    assert nll(found.log(), labels) < nll(apply_posthoc(logits, fit_posthoc("temperature", logits, labels)), labels) - 0.01


def test_affine_maps_are_where_scipy_finds_them() -> None:
    logits, labels = sample(120, 3)
    z, temperature, strength = logits - logits.mean(dim=1, keepdim=True), 2.5, 0.3
    found = fit_affine(z, labels, strength, temperature)

    def objective(flat: np.ndarray) -> float:
        affine = torch.from_numpy(flat).view(3, 4)
        weights, bias = affine[:, :3] * temperature, affine[:, 3]
        off = weights[~torch.eye(3, dtype=torch.bool)]
        loss = cross_entropy(z @ affine[:, :3].T + bias, labels)
        return float(loss + strength * (off.square().mean() + bias.square().mean()) + (weights.diag() - 1).square().sum() / 240)

    best = minimize(objective, np.zeros(12), method="BFGS", options={"gtol": 1e-8})
    assert objective(found.flatten().numpy()) == pytest.approx(best.fun, abs=1e-7)
    assert found.flatten().tolist() == pytest.approx(best.x.tolist(), abs=2e-3)


def test_a_weak_affine_map_predicts_as_logistic_regression() -> None:
    logits, labels = sample(3000, 3)
    z = logits - logits.mean(dim=1, keepdim=True)
    ours = (torch.cat([z, torch.ones(3000, 1)], dim=1) @ fit_affine(z, labels, 1e-9).T).softmax(dim=1)
    theirs = LogisticRegression(C=1e9, max_iter=2000, tol=1e-10).fit(z.numpy(), labels.numpy()).predict_proba(z.numpy())
    assert (ours - torch.from_numpy(theirs)).abs().max() < 2e-3


def test_dirichlet_recovers_a_map_of_many_images() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(30_000, 3, generator=draw, dtype=torch.float64)
    matrix = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.8, -0.1], [0.1, 0.0, 0.4]]).double()
    truth = (logits.log_softmax(dim=1) @ matrix.T + torch.tensor([0.3, 0.0, -0.3])).softmax(dim=1)
    labels = torch.multinomial(truth, 1, generator=draw).squeeze(1)
    found = apply_posthoc(logits, fit_posthoc("dirichlet", logits, labels)).exp()
    assert (found - truth).abs().sum(dim=1).mean() < 0.03


def test_log_odds_are_exact_where_a_probability_rounds_to_one() -> None:
    odds = log_odds(torch.tensor([[50.0, 0.0, 0.0]]).double())[0]
    assert odds[0].item() == pytest.approx(50 - np.log(2), rel=1e-12)
    assert torch.allclose(log_odds(torch.tensor([[0.3, -0.2]]).double()), torch.tensor([[0.5, -0.5]]).double())


def test_isotonic_agrees_with_one_regression_for_each_class() -> None:
    from sklearn.isotonic import IsotonicRegression

    logits, labels = sample(300, 3)
    found = apply_posthoc(logits, fit_posthoc("isotonic", logits, labels)).exp()
    odds, columns = log_odds(logits), []
    for k in range(3):
        model = IsotonicRegression(out_of_bounds="clip").fit(odds[:, k].numpy(), (labels == k).numpy())
        columns.append(model.predict(odds[:, k].numpy()).clip(1 / 302, 1 - 1 / 302))
    probs = np.stack(columns, axis=1)
    assert np.allclose(found.numpy(), probs / probs.sum(axis=1, keepdims=True))


def test_a_histogram_is_the_share_of_the_class_in_each_bin() -> None:
    # Two classes, so both columns hold the same bins; 40 images make four bins of ten.
    logits = torch.stack([torch.arange(40.0), torch.zeros(40)], dim=1).double() / 10 - 2
    labels = torch.tensor([1] * 10 + [1, 0] * 5 + [0, 0, 0, 0, 1] * 2 + [0] * 10)
    found = apply_posthoc(logits, fit_posthoc("histogram", logits, labels)).exp()[:, 0]
    floor = 1 / 42
    expected = torch.tensor([floor] * 10 + [0.5] * 10 + [0.8] * 10 + [1 - floor] * 10).double()
    assert torch.allclose(found, expected)


def test_equal_scores_share_a_bin_of_the_histogram() -> None:
    logits = torch.tensor([[0.0, 0.0]] * 30 + [[2.0, 0.0]] * 3).double()
    labels = torch.tensor([0] * 15 + [1] * 15 + [0] * 3)
    found = apply_posthoc(logits, fit_posthoc("histogram", logits, labels)).exp()
    # Class 0: a bin for each score; class 1: the lower score is too rare for a bin of its own.
    first, second = (15 / 30, 1 - 1 / 35), (15 / 33, 15 / 33)
    for row, a, b in zip(found[[0, -1]], first, second, strict=True):
        assert row.tolist() == pytest.approx([a / (a + b), b / (a + b)])


@pytest.mark.parametrize("name", POSTHOC)
def test_a_class_without_validation_images_keeps_a_probability(name: str) -> None:
    logits, labels = sample(300)
    kept = labels != 2
    fitted = fit_posthoc(name, logits[kept], labels[kept])
    assert bool(apply_posthoc(logits, fitted).isfinite().all())
    if name in ("isotonic", "histogram"):
        assert fitted.note.startswith("1 of 4 classes have no validation image")


@pytest.mark.parametrize("name", [name for name in POSTHOC if name != "none"])
def test_images_that_are_all_right_tell_nothing(name: str) -> None:
    logits, _ = sample(100)
    fitted = fit_posthoc(name, logits, logits.argmax(dim=1))
    assert bool(apply_posthoc(logits, fitted).isfinite().all())
    if name in NESTED:
        assert "every held-out image is right" in fitted.note


@pytest.mark.parametrize("name", ["vector", "matrix", "dirichlet", "isotonic", "histogram"])
def test_too_few_images_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"run a: posthoc {name} needs at least 10 validation images, got 9: enlarge"):
        fit_posthoc(name, *sample(9), where="run a")


def test_what_is_no_logit_is_refused_in_one_line() -> None:
    logits, labels = sample(20)
    logits[3, 1] = float("nan")
    with pytest.raises(InputError, match="posthoc temperature: logits must be finite, got nan or inf in 1 of 20 rows"):
        fit_posthoc("temperature", logits, labels)
    with pytest.raises(InputError, match="posthoc: unknown 'platt'; one of none, temperature"):
        fit_posthoc("platt", logits, labels)


@pytest.mark.parametrize("name", ["vector", "matrix", "dirichlet", "isotonic", "histogram"])
def test_logits_of_other_classes_are_refused(name: str) -> None:
    fitted = fit_posthoc(name, *sample(50))
    with pytest.raises(InputError, match=f"posthoc {name} was fitted for 4 classes, got logits of 5"):
        apply_posthoc(torch.zeros(2, 5), fitted)


@pytest.mark.parametrize("name", ["matrix", "dirichlet"])
def test_of_many_classes_the_matrix_is_diagonal(name: str) -> None:
    """K^2 numbers are more than the images tell; it is then vector scaling of what the map sees."""
    classes = MOST_CLASSES + 1
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (900,), generator=draw)
    logits = torch.randn(900, classes, generator=draw, dtype=torch.float64)
    logits[torch.arange(900), labels] += 3
    fitted = fit_posthoc(name, logits, labels)
    assert fitted.note == f"{classes} classes, more than 200: a diagonal matrix"
    assert np.shape(fitted.values["matrix"]) == (classes, 2)
    z = logits - logits.mean(dim=1, keepdim=True) if name == "matrix" else logits.log_softmax(dim=1)
    weights, biases = fit_vector(z, labels, fit_scaled_temperature(z, labels)[0])
    assert torch.allclose(apply_posthoc(logits, fitted), (weights * z + biases).log_softmax(dim=1))
    with pytest.raises(InputError, match=f"posthoc {name} was fitted for {classes} classes, got logits of 5"):
        apply_posthoc(torch.zeros(2, 5), fitted)
    right = fit_posthoc(name, logits, logits.argmax(dim=1))
    assert "temperature scaling instead" in right.note
    assert torch.allclose(apply_posthoc(logits, right), logits.log_softmax(dim=1))
