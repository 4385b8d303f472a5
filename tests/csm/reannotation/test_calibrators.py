from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax
from sklearn.isotonic import IsotonicRegression
from torch.nn.functional import cross_entropy

from csm import storage
from csm.posthoc import fit_temperature
from csm.reannotation.calibration import fit_calibration
from csm.reannotation.calibrators import CALIBRATORS, Calibration, apply_calibration, describe

CLASSES = 3
INF = float("inf")
POSTERIOR = [name for name, kind in CALIBRATORS.items() if kind.fit_posterior]
Sample = tuple[torch.Tensor, torch.Tensor]


def others(shares: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return np.array([shares[i, k] for i in range(len(labels)) for k in range(shares.shape[1]) if k != labels[i]], dtype=float)


def test_the_temperature_is_that_of_least_nll(held_out_posterior: Sample) -> None:
    scores, labels = held_out_posterior
    calibration = fit_calibration("temperature", scores, None, labels)
    best = minimize_scalar(lambda t: cross_entropy(scores.double() / t, labels).item(), bounds=(0.1, 20), method="bounded")
    assert calibration.temperature == pytest.approx(best.x, rel=1e-3)
    assert calibration.nll_after == pytest.approx(best.fun, abs=1e-8)
    assert calibration.nll_before == pytest.approx(cross_entropy(scores.double(), labels).item())
    assert calibration.images == 600
    assert not calibration.note


@pytest.mark.parametrize("factor", [0.05, 1000.0])
def test_the_temperature_follows_the_size_of_the_log_posterior(held_out_posterior: Sample, factor: float) -> None:
    """As of likelihoods of many pixels, which a T of 100 does not reach."""
    scores, labels = held_out_posterior
    expected = fit_calibration("temperature", scores, None, labels)
    found = fit_calibration("temperature", factor * scores, None, labels)
    assert found.temperature == pytest.approx(factor * expected.temperature, rel=1e-5)
    assert found.nll == pytest.approx(expected.nll)
    assert not found.note


def test_the_vector_is_that_of_least_penalised_nll_and_undoes_what_was_done(held_out_posterior: Sample) -> None:
    scores, labels = held_out_posterior
    calibration = fit_calibration("vector", scores, None, labels)
    logs, temperature = log_softmax(scores.double().numpy(), axis=1), fit_temperature(scores, labels)

    def loss(parameters: np.ndarray) -> float:
        weights, biases = parameters.reshape(2, CLASSES)
        nll = -log_softmax(logs * weights + biases, axis=1)[np.arange(600), labels.numpy()].sum()
        return nll + 0.5 * ((weights * temperature - 1) ** 2 + biases**2).sum()

    best = minimize(loss, np.repeat([1 / temperature, 0.0], CLASSES), method="BFGS", options={"gtol": 1e-5})
    assert np.array([calibration.weights, calibration.biases]) == pytest.approx(best.x.reshape(2, CLASSES), abs=1e-3)
    assert calibration.biases[0] < min(calibration.biases[1:]) - 0.3  # the lean to class 0
    assert calibration.nll_after == pytest.approx(loss(best.x) / 600, abs=0.005)
    assert calibration.nll is not None
    assert calibration.nll < fit_calibration("temperature", scores, None, labels).nll


def test_isotonic_is_scikit_learns_for_each_class_and_never_certain(held_out_posterior: Sample) -> None:
    scores, labels = held_out_posterior
    calibration = fit_calibration("isotonic", scores, None, labels)
    probs = scores.double().softmax(dim=1).numpy()
    odds = np.log(probs / (1 - probs))
    expected = np.stack(
        [
            IsotonicRegression(y_min=1 / 602, y_max=601 / 602, out_of_bounds="clip").fit_transform(
                odds[:, k], labels.numpy() == k
            )
            for k in range(CLASSES)
        ],
        axis=1,
    )
    found = apply_calibration(scores, calibration).exp()
    assert found.numpy() == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-6)
    extreme = torch.tensor([[0.0, -1e4, -1e5], [-INF, 0.0, -INF], [0.0, 0.0, 0.0]])
    assert (apply_calibration(extreme, calibration).exp() > 1 / 700).all()
    middle = torch.tensor([[0.0, -0.123, 0.456]])
    probs = middle.double().softmax(dim=1)[0].numpy()
    odds = np.log(probs) - np.log(1 - probs)
    one = [np.interp(score, *np.array(knots).T) for score, knots in zip(odds, calibration.knots, strict=True)]
    assert apply_calibration(middle, calibration).exp()[0].tolist() == pytest.approx(np.divide(one, sum(one)).tolist())


def test_isotonic_tells_certainties_apart_where_probabilities_round_to_1() -> None:
    """Log-odds of 50 and 200: both 1 in float64, but the images of the first are wrong half of the time."""
    margins = torch.tensor([50.0, 200.0], dtype=torch.float64).repeat(40)
    scores = torch.stack([margins, torch.zeros(80)], dim=1)
    labels = torch.arange(80) // 2 % 2 * (margins == 50)
    found = apply_calibration(scores, fit_calibration("isotonic", scores, None, labels)).exp()
    assert found[margins == 50, 0].tolist() == pytest.approx([0.5] * 40, abs=0.01)
    assert (found[margins == 200, 0] > 0.95).all()


def test_the_scale_is_that_of_least_nll_of_pairs(held_out_pairs: Sample) -> None:
    table, labels = held_out_pairs
    calibration = fit_calibration("scale", None, table, labels)
    own = others(table, labels)
    best = minimize_scalar(lambda s: np.log1p(np.exp(-s * (own - 0.5))).mean(), bounds=(0.01, 100), method="bounded")
    assert calibration.scale == pytest.approx(best.x, rel=1e-4)
    assert calibration.scale == pytest.approx(6, rel=0.15)
    assert calibration.nll_after == pytest.approx(best.fun)
    assert calibration.pair
    assert (own <= 0).any()
    assert calibration.nll_before is None  # the clipped share gives some class nothing, at a cost without bound


def test_isotonic_of_shares_is_scikit_learns_and_takes_both_classes_alike(held_out_pairs: Sample) -> None:
    table, labels = held_out_pairs
    calibration = fit_calibration("isotonic", None, table, labels)
    own = others(table, labels)
    fitted = IsotonicRegression(y_min=1 / 1202, y_max=1201 / 1202, out_of_bounds="clip").fit(
        np.concatenate([own, 1 - own]), np.repeat([1, 0], len(own))
    )
    grid = np.linspace(-3, 4, 101)
    apply = CALIBRATORS["isotonic"].apply_share
    assert apply is not None
    found = torch.sigmoid(apply(torch.from_numpy(grid), calibration)).numpy()
    assert found == pytest.approx(fitted.predict(grid), abs=1e-6)
    assert found + found[::-1] == pytest.approx(np.ones(101), abs=1e-6)


def test_images_that_are_all_right_do_not_tell_the_temperature() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).log_softmax(dim=1).repeat(20, 1)
    labels = torch.tensor([0, 1]).repeat(20)
    for calibrator in ("temperature", "vector"):
        calibration = fit_calibration(calibrator, scores, None, labels)
        assert (calibration.calibrator, calibration.temperature) == ("temperature", 1.0)
        assert "every held-out image is right, which does not tell T: kept at 1" in calibration.note


def test_shares_that_are_all_on_their_side_do_not_tell_the_scale() -> None:
    calibration = fit_calibration("scale", None, torch.tensor([[9.0, 0.6], [0.9, -9.0]]), torch.tensor([0, 1]))
    assert calibration.scale == 4.0
    assert "does not tell s: kept at 4" in calibration.note


def test_values_at_the_end_of_their_range_are_noted() -> None:
    wrong = torch.tensor([[0.0, -1.0]]).repeat(4, 1)
    assert fit_calibration("temperature", wrong, None, torch.ones(4, dtype=torch.int64)).note == "T = 100 is the end of its range"
    shares = torch.tensor([[9.0, 0.2], [0.3, 9.0]])
    assert fit_calibration("scale", None, shares, torch.tensor([0, 1])).note == "s = 0.01 is the end of its range"


@pytest.mark.parametrize("calibrator", list(CALIBRATORS))
def test_a_calibration_comes_back_from_its_file(
    tmp_path: Path, held_out_posterior: Sample, held_out_pairs: Sample, calibrator: str
) -> None:
    if calibrator in POSTERIOR:
        calibration = fit_calibration(calibrator, held_out_posterior[0], None, held_out_posterior[1], pair=True)
    else:
        calibration = fit_calibration(calibrator, None, *held_out_pairs)
    storage.write_json(tmp_path / "calibration.json", asdict(calibration))
    assert storage.read_record(tmp_path / "calibration.json", Calibration) == calibration


def test_labels_are_described() -> None:
    fitted = Calibration("temperature", images=30, temperature=2.0)
    assert describe(fitted) == "of all classes, at temperature 2, fitted on 30 real images"
    assert describe(Calibration("scale", pair=True, scale=4.0)) == "of the two classes alone, with scale s = 4"
    assert describe(Calibration("none", pair=True)) == "of the two classes alone, as annotated"
