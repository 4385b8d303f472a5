from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from csm.errors import InputError
from csm.reannotation.heads import FitInputs
from csm.reannotation.lda import fit_lda, load_lda

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Inputs = Callable[..., FitInputs]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_with_a_fixed_shrinkage_it_is_that_of_scikit_learn(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, shrinkage: float
) -> None:
    (x, labels), (queries, _) = clouds(80), clouds(30, seed=1)
    fit_lda(tmp_path, fit_inputs((x, labels)), shrinkage=shrinkage)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.double().numpy(), labels.numpy())
    expected = oracle.predict_log_proba(queries.double().numpy())
    assert load_lda(tmp_path)(queries).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("rows", [12, 80])  # of 20 dimensions
def test_by_default_the_shrinkage_is_that_of_ledoit_and_wolf(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, rows: int
) -> None:
    (x, labels), (queries, _) = clouds(rows, size=20), clouds(30, seed=1, size=20)
    fit_lda(tmp_path, fit_inputs((x, labels)))
    values, truth = x.double().numpy(), labels.numpy()
    means = np.stack([values[truth == label].mean(axis=0) for label in range(3)])
    covariance, amount = ledoit_wolf(values - means[truth], assume_centered=True)
    densities = [multivariate_normal(mean, covariance).logpdf(queries.double().numpy()) for mean in means]
    expected = log_softmax(np.stack(densities, axis=1) + np.log(np.bincount(truth) / rows), axis=1)
    head = load_lda(tmp_path)
    assert head(queries).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert head.shrinkage.item() == pytest.approx(amount, rel=1e-5)


@pytest.mark.parametrize("shrinkage", [0.0, -1.0])
def test_a_constant_dimension_says_nothing(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, shrinkage: float) -> None:
    (x, labels), (queries, _) = clouds(80), clouds(30, seed=1)
    fit_lda(tmp_path / "without", fit_inputs((x, labels)), shrinkage=0.0)
    fit_lda(tmp_path / "with", fit_inputs((torch.cat([x, torch.full((80, 1), -1.0)], dim=1), labels)), shrinkage=shrinkage)
    found = load_lda(tmp_path / "with")(torch.cat([queries, torch.full((30, 1), -0.5)], dim=1))
    assert found.isfinite().all()
    if shrinkage == 0:
        assert torch.allclose(found, load_lda(tmp_path / "without")(queries), atol=1e-3)


def test_a_class_of_one_image_is_enough(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    x, labels = clouds(80)
    keep = (labels != 2) | (torch.arange(80) == 3)
    fit_lda(tmp_path, fit_inputs((x[keep], labels[keep])))
    assert load_lda(tmp_path)(x[3:4]).argmax().item() == 2


def test_classes_without_spread_are_refused(tmp_path: Path, fit_inputs: Inputs) -> None:
    labels = torch.arange(6) % 3
    with pytest.raises(InputError, match="lda: the features of each class are all equal"):
        fit_lda(tmp_path, fit_inputs((labels[:, None].float(), labels)))


@pytest.mark.parametrize("shrinkage", [-0.5, 1.5, float("nan")])
def test_a_shrinkage_out_of_range_is_refused(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, shrinkage: float) -> None:
    with pytest.raises(InputError, match=r"lda.shrinkage: expected a number from 0 to 1, or -1"):
        fit_lda(tmp_path, fit_inputs(clouds(8)), shrinkage=shrinkage)


def test_too_many_features_are_refused(tmp_path: Path, fit_inputs: Inputs) -> None:
    with pytest.raises(InputError, match=r"lda: 1 covariances of 12000 x 12000 take 1.1 GiB"):
        fit_lda(tmp_path, fit_inputs((torch.zeros(3, 12000), torch.arange(3))))
