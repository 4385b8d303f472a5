from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from csm.errors import InputError
from csm.reannotation import moments
from csm.reannotation.moments import check_memory, class_means, class_scatters, pooled_scatter

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def batches(x: torch.Tensor, labels: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(size), labels.split(size), strict=True))


def centred(x: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    values = x.double().numpy().copy()
    for label in labels.unique().tolist():
        rows = labels.numpy() == label
        values[rows] -= values[rows].mean(axis=0)
    return values


@pytest.mark.parametrize("size", [1, 7, 100])
def test_means_and_scatters_are_those_of_all_rows_at_once(clouds: Clouds, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(moments, "CHUNK", 5)
    x, labels = clouds(61)
    given = batches(x, labels, size)
    counts, means = class_means(given, 3, "here")
    assert counts.tolist() == [31, 15, 15]
    each, pooled = class_scatters(given, means), pooled_scatter(given, means)
    for label in range(3):
        own = centred(x, labels)[labels.numpy() == label]
        assert means[label].numpy() == pytest.approx(x.double().numpy()[labels.numpy() == label].mean(axis=0))
        assert each.scatter[label].numpy() == pytest.approx(np.cov(own.T, bias=True) * len(own))
        assert each.fourth[label].item() == pytest.approx((np.linalg.norm(own, axis=1) ** 4).sum())
    for one, other in ((pooled.counts, counts), (pooled.scatter, each.scatter), (pooled.fourth, each.fourth)):
        assert torch.allclose(one, other.sum(dim=0, keepdim=True), rtol=1e-12)
    assert torch.allclose(each.pooled().scatter, pooled.scatter)


@pytest.mark.parametrize(("rows", "size"), [(60, 5), (400, 3), (12, 20), (5, 1)])  # also fewer images than dimensions
def test_the_shrunk_covariance_is_that_of_scikit_learn(clouds: Clouds, rows: int, size: int) -> None:
    x, labels = clouds(rows, size=size)
    _, means = class_means([(x, labels)], 3, "here")
    expected, amount = ledoit_wolf(centred(x, labels), assume_centered=True)
    pooled = pooled_scatter([(x, labels)], means)
    assert pooled.ledoit_wolf(0) == pytest.approx(amount, rel=1e-9)
    assert pooled.covariance(0).numpy() == pytest.approx(expected, rel=1e-9)
    expected, amount = ledoit_wolf(x[labels == 0].double().numpy())
    each = class_scatters([(x, labels)], means)
    assert each.ledoit_wolf(0) == pytest.approx(amount, rel=1e-9)
    assert each.covariance(0).numpy() == pytest.approx(expected, rel=1e-9)


def test_a_fixed_shrinkage_goes_from_the_sample_to_a_multiple_of_the_unit_matrix(clouds: Clouds) -> None:
    x, labels = clouds(50)
    pooled = pooled_scatter([(x, labels)], class_means([(x, labels)], 3, "here")[1])
    sample = np.cov(centred(x, labels).T, bias=True)
    assert pooled.covariance(0, 0.0).numpy() == pytest.approx(sample)
    assert pooled.covariance(0, 1.0).numpy() == pytest.approx(np.trace(sample) / 5 * np.eye(5))


def test_no_spread_needs_no_shrinkage() -> None:
    x, labels = torch.ones(6, 2), torch.tensor([0, 1] * 3)
    scatter = class_scatters([(x, labels)], class_means([(x, labels)], 2, "here")[1])
    assert scatter.ledoit_wolf(0) == 0
    assert not scatter.covariance(0).any()


def test_covariances_that_are_too_large_are_refused() -> None:
    check_memory("qda", 2, 8192)  # 1 GiB
    with pytest.raises(InputError, match=r"qda: 3 covariances of 8192 x 8192 take 1.5 GiB, the limit is 1 GiB"):
        check_memory("qda", 3, 8192)
