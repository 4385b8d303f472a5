from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf, ledoit_wolf
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

from csm.errors import InputError
from csm.reannotation import moments
from csm.reannotation.heads import FitInputs
from csm.reannotation.lda import fit_lda, load_lda
from csm.reannotation.qda import POOLINGS, fit_qda, load_qda
from csm.reannotation.selection import held_out_nll

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Inputs = Callable[..., FitInputs]


def test_without_pooling_it_is_that_of_scikit_learn(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    (x, labels), (queries, _) = clouds(80), clouds(30, seed=1)
    fit_qda(tmp_path, fit_inputs((x, labels)), pooling=0.0)
    oracle = QuadraticDiscriminantAnalysis(solver="eigen", covariance_estimator=LedoitWolf())
    expected = oracle.fit(x.double().numpy(), labels.numpy()).predict_log_proba(queries.double().numpy())
    assert load_qda(tmp_path)(queries).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_with_all_pooled_it_is_lda(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    inputs, (queries, _) = fit_inputs(clouds(80)), clouds(30, seed=1)
    fit_qda(tmp_path, inputs, pooling=1.0)
    fit_lda(tmp_path, inputs)
    assert torch.allclose(load_qda(tmp_path)(queries), load_lda(tmp_path)(queries), atol=1e-3)


@pytest.mark.parametrize("rows", [12, 80])  # of 20 dimensions
def test_pooling_lies_between_the_own_and_the_common_covariance(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, rows: int
) -> None:
    (x, labels), (queries, _) = clouds(rows, size=20), clouds(30, seed=1, size=20)
    fit_qda(tmp_path, fit_inputs((x, labels)), pooling=0.4)
    values, truth = x.double().numpy(), labels.numpy()
    means = np.stack([values[truth == label].mean(axis=0) for label in range(3)])
    common, _ = ledoit_wolf(values - means[truth], assume_centered=True)
    densities = []
    for label, mean in enumerate(means):
        covariance = 0.6 * ledoit_wolf(values[truth == label])[0] + 0.4 * common
        densities.append(multivariate_normal(mean, covariance).logpdf(queries.double().numpy()))
    expected = log_softmax(np.stack(densities, axis=1) + np.log(np.bincount(truth) / rows), axis=1)
    assert load_qda(tmp_path)(queries).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("alike", "expected"), [(True, {1.0, 0.9, 0.75}), (False, {0.0, 0.25})])
def test_pooling_is_chosen_by_held_out_nll(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, alike: bool, expected: set[float]
) -> None:
    inputs = fit_inputs(clouds(200, alike=alike), clouds(400, seed=1, alike=alike))
    fit_qda(tmp_path, inputs)
    chosen = load_qda(tmp_path)
    losses = {}
    for pooling in POOLINGS:
        fit_qda(tmp_path, inputs, pooling=pooling)
        losses[pooling] = held_out_nll(load_qda(tmp_path), inputs.features, "here")
    assert chosen.pooling.item() == pytest.approx(min(losses, key=losses.__getitem__))
    assert held_out_nll(chosen, inputs.features, "here") == min(losses.values())
    assert round(chosen.pooling.item(), 2) in expected


@pytest.mark.parametrize("shrinkage", [0.0, -1.0])
def test_dimensions_without_spread_in_some_classes_or_all(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, shrinkage: float
) -> None:
    x, labels = clouds(80)
    x[labels == 1, 2] = 3.0
    x[:, 4] = -1.0
    fit_qda(tmp_path, fit_inputs((x, labels)), pooling=0.0, shrinkage=shrinkage)
    queries = x[:10] + 0.1
    found = load_qda(tmp_path)(queries)
    assert found.isfinite().all()
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(10), atol=1e-4)


def test_a_class_of_equal_images_is_a_narrow_gaussian(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    x, labels = clouds(80)
    x[labels == 2] = x[3].clone()
    fit_qda(tmp_path, fit_inputs((x, labels)), pooling=0.0)
    found = load_qda(tmp_path)(x)
    assert found.isfinite().all()
    assert (found.argmax(dim=1) == 2).tolist() == (labels == 2).tolist()


def test_classes_of_one_image_are_named(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    x, labels = clouds(80)
    keep = (labels == 0) | (torch.arange(80) < 4)
    with pytest.raises(InputError, match="qda: only 1 training image of class b, c, at least 2 are needed"):
        fit_qda(tmp_path, fit_inputs((x[keep], labels[keep])))


def test_too_many_features_are_refused(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "LIMIT", 599)
    with pytest.raises(InputError, match="qda: 3 covariances of 5 x 5 take"):
        fit_qda(tmp_path, fit_inputs(clouds(80)))


def test_a_pooling_out_of_range_is_refused(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    with pytest.raises(InputError, match=r"qda.pooling: expected a number from 0 to 1, or -1"):
        fit_qda(tmp_path, fit_inputs(clouds(8)), pooling=1.01)


def test_without_held_out_images_there_is_nothing_to_choose_by(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    with pytest.raises(InputError, match="qda: there is no validation image to choose its settings by"):
        fit_qda(tmp_path, fit_inputs(clouds(80)))
