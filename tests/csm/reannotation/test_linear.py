import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from csm.errors import InputError
from csm.reannotation.heads import FitInputs
from csm.reannotation.linear import STRENGTHS, fit_linear, load_linear
from csm.reannotation.selection import held_out_nll

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Inputs = Callable[..., FitInputs]


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_it_is_that_of_scikit_learn_on_standardised_features(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, n_classes: int, c: float
) -> None:
    (x, labels), (queries, _) = clouds(80), clouds(30, seed=1)
    x, labels = x[labels < n_classes] * torch.tensor([1, 1e-3, 1, 1e3, 1]), labels[labels < n_classes]
    queries = queries * torch.tensor([1, 1e-3, 1, 1e3, 1])
    fit_linear(tmp_path, fit_inputs((x, labels), n_classes=n_classes), c=c)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=10_000)).fit(x.double(), labels)
    assert load_linear(tmp_path)(queries).numpy() == pytest.approx(oracle.predict_log_proba(queries.double()), rel=1e-2, abs=1e-2)


def test_c_is_chosen_by_held_out_nll(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    inputs = fit_inputs(clouds(24, size=20), clouds(400, seed=1, size=20))
    fit_linear(tmp_path, inputs)
    chosen = load_linear(tmp_path)
    losses = {}
    for c in STRENGTHS:
        fit_linear(tmp_path, inputs, c=c)
        losses[c] = held_out_nll(load_linear(tmp_path), inputs.features, "here")
    assert float(chosen.c) == pytest.approx(min(losses, key=losses.__getitem__))
    assert held_out_nll(chosen, inputs.features, "here") == pytest.approx(min(losses.values()), abs=1e-3)


def test_a_constant_dimension_says_nothing(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    x, labels = clouds(80)
    fit_linear(tmp_path / "without", fit_inputs((x, labels)), c=1.0)
    fit_linear(tmp_path / "with", fit_inputs((torch.cat([x, torch.ones(80, 1)], dim=1), labels)), c=1.0)
    found = load_linear(tmp_path / "with")(torch.cat([x, torch.full((80, 1), 9.0)], dim=1))
    assert torch.allclose(found, load_linear(tmp_path / "without")(x), atol=1e-3)


def test_a_fit_that_does_not_converge_says_so(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = fit_inputs(clouds(80), clouds(40, seed=1))
    with pytest.raises(InputError, match="linear: the fit does not converge in 1 iterations"):
        fit_linear(tmp_path, inputs, c=1.0, iterations=1)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_linear(tmp_path, inputs, iterations=8)  # enough for the stiff ones
    left_out = [record.args[0] for record in caplog.records]  # type: ignore[index]
    assert left_out
    assert float(load_linear(tmp_path).c) not in left_out


@pytest.mark.parametrize(("setting", "message"), [({"c": -1.0}, "linear.c"), ({"iterations": 0}, "linear.iterations")])
def test_settings_out_of_range_are_refused(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, setting: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit_linear(tmp_path, fit_inputs(clouds(80)), **setting)  # type: ignore[arg-type]
