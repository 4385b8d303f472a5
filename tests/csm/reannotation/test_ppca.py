"""Gaussian classes of low rank, against scikit-learn's principal components and scipy's densities."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA

from csm.errors import InputError
from csm.reannotation import ppca
from csm.reannotation.heads import FitInputs
from csm.reannotation.lda import FLOOR
from csm.reannotation.qda import fit_qda, load_qda
from csm.reannotation.selection import held_out_nll

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Inputs = Callable[..., FitInputs]


def covariance(head: ppca.LowRankQDA, label: int) -> np.ndarray:
    """Of a class, put together from the head's axes and variances."""
    axes, along, rest = (tensor[label].double().numpy() for tensor in (head.axes, head.along, head.rest))
    return axes @ np.diag(along - rest) @ axes.T + rest * np.eye(len(axes))


@pytest.mark.parametrize("rank", [1, 3, 19])
def test_each_class_has_the_covariance_of_scikit_learn_s_pca(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, rank: int
) -> None:
    x, labels = clouds(200, size=20)
    fit_qda(tmp_path, fit_inputs((x, labels)), pooling=0.0, shrinkage=0.0, rank=rank)
    head, values, truth = load_qda(tmp_path), x.double().numpy(), labels.numpy()
    means = np.stack([values[truth == label].mean(axis=0) for label in range(3)])
    least = FLOOR * (values - means[truth]).var(axis=0).mean()
    for label in range(3):
        own = values[truth == label]
        oracle = PCA(rank, svd_solver="full").fit(own).get_covariance()
        expected = oracle * (len(own) - 1) / len(own)  # it divides by one less than the number of images
        assert covariance(head, label) == pytest.approx(expected + least * np.eye(20), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("pooling", "shrinkage"), [(0.0, 0.0), (0.35, 0.0), (1.0, 0.0), (0.35, 0.2)])
def test_the_posterior_is_that_of_scipy_s_densities(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, pooling: float, shrinkage: float
) -> None:
    (x, labels), (queries, _) = clouds(120, size=12), clouds(40, seed=1, size=12)
    chosen = fit_qda(tmp_path, fit_inputs((x, labels)), pooling=pooling, shrinkage=shrinkage, rank=4)
    assert chosen == {}
    values, truth = x.double().numpy(), labels.numpy()
    means = np.stack([values[truth == label].mean(axis=0) for label in range(3)])
    shrunk = lambda c: (1 - shrinkage) * c + shrinkage * np.trace(c) / 12 * np.eye(12)  # noqa: E731
    common = shrunk(np.cov((values - means[truth]).T, bias=True))
    densities = []
    for label, mean in enumerate(means):
        whole = (1 - pooling) * shrunk(np.cov(values[truth == label].T, bias=True)) + pooling * common
        eigenvalues, vectors = np.linalg.eigh(whole)
        eigenvalues[:8] = eigenvalues[:8].mean()
        densities.append(multivariate_normal(mean, (vectors * eigenvalues) @ vectors.T).logpdf(queries.double().numpy()))
    expected = log_softmax(np.stack(densities, axis=1) + np.log(np.bincount(truth) / 120), axis=1)
    assert load_qda(tmp_path)(queries).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_rank_and_pooling_are_chosen_by_held_out_nll(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    inputs = fit_inputs(clouds(60, size=10), clouds(200, seed=1, size=10))
    chosen = fit_qda(tmp_path, inputs, rank=-1)
    head = load_qda(tmp_path)
    losses = {}
    for rank in (2, 4, 6, 9):
        for pooling in ppca.POOLINGS:
            fit_qda(tmp_path, inputs, pooling=pooling, rank=rank)
            losses[rank, pooling] = held_out_nll(load_qda(tmp_path), inputs.features, "here")
    assert held_out_nll(head, inputs.features, "here") == min(losses.values())
    assert (chosen["rank"], chosen["pooling"]) == min(losses, key=losses.__getitem__)
    assert len(set(losses.values())) > 6
    assert fit_qda(tmp_path, inputs, pooling=0.35, rank=-1) == {
        "rank": min(losses, key=lambda key: (key[1] != 0.35, losses[key]))[0]
    }
    assert fit_qda(tmp_path, inputs, rank=6) == {"pooling": min(losses, key=lambda key: (key[0] != 6, losses[key]))[1]}


def test_more_axes_than_the_images_of_a_class_span_are_borne(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    x, labels = clouds(16, size=20)
    x[:, 3] = 1.0  # without spread
    fit_qda(tmp_path, fit_inputs((x, labels)), pooling=0.0, shrinkage=0.0, rank=12)
    found = load_qda(tmp_path)(x)
    assert found.isfinite().all()
    assert (found.argmax(dim=1) == labels).all()


@pytest.mark.parametrize("rank", [5, 9])
def test_a_rank_of_as_many_as_the_features_is_refused(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, rank: int) -> None:
    with pytest.raises(InputError, match=rf"qda\.rank: {rank} principal axes of 5 features: expected fewer axes than features"):
        fit_qda(tmp_path, fit_inputs(clouds(80)), rank=rank, pooling=0.0)


def test_too_few_features_leave_no_rank_to_choose(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    with pytest.raises(InputError, match=r"qda\.rank: 2 principal axes or more of 2 features: .*; set rank 0"):
        fit_qda(tmp_path, fit_inputs(clouds(80, size=2), clouds(20, size=2)), rank=-1)


def test_without_held_out_images_there_is_nothing_to_choose_by(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    with pytest.raises(InputError, match="qda: there is no validation image to choose its settings by"):
        fit_qda(tmp_path, fit_inputs(clouds(80)), rank=2)
