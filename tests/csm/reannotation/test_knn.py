import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from csm.errors import InputError
from csm.reannotation import knn
from csm.reannotation.heads import FitInputs
from csm.reannotation.knn import BANDWIDTHS, NEIGHBOURS, fit_knn, load_knn

Clouds = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Inputs = Callable[..., FitInputs]


def by_hand(query: np.ndarray, x: np.ndarray, labels: np.ndarray, priors: np.ndarray, count: int, bandwidth: float) -> np.ndarray:
    """Log-posterior of one query, in the words of the docstring."""
    ranked = sorted((float(((query - row) ** 2).sum()), int(label)) for row, label in zip(x, labels, strict=True))
    votes = priors.copy()
    for square, label in ranked[:count]:
        votes[label] += math.exp(-(square - ranked[0][0]) / (2 * bandwidth**2 * ranked[count][0]))
    return np.log(votes / votes.sum())


@pytest.mark.parametrize(("count", "bandwidth"), [(1, 0.2), (7, 0.4), (78, 0.8)])
@pytest.mark.parametrize("block", [1, 300, 2**24])  # one query at a time, three at a time, all
def test_votes_by_hand(
    tmp_path: Path,
    clouds: Clouds,
    fit_inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    bandwidth: float,
    block: int,
) -> None:
    monkeypatch.setattr(knn, "BLOCK", block)
    (x, labels), (queries, _) = clouds(80), clouds(10, seed=1)
    fit_knn(tmp_path, fit_inputs((x, labels)), neighbours=count, bandwidth=bandwidth)
    found = load_knn(tmp_path)(queries)
    priors = np.bincount(labels.numpy()) / 80
    for row in range(10):
        expected = by_hand(queries[row].double().numpy(), x.double().numpy(), labels.numpy(), priors, count, bandwidth)
        assert found[row].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("left_out", [1000, 25])
def test_neighbours_and_bandwidth_have_the_highest_left_out_likelihood(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, monkeypatch: pytest.MonkeyPatch, left_out: int
) -> None:
    monkeypatch.setattr(knn, "LEFT_OUT", left_out)
    monkeypatch.setattr(knn, "BLOCK", 2000)  # several blocks
    x, labels = clouds(60)
    inputs = fit_inputs((x, labels))
    fit_knn(tmp_path, inputs)
    values, truth = (value.numpy() for value in inputs.features.matrix("train"))
    values, priors = values.astype(np.float64), np.bincount(truth) / 60
    total: dict[tuple[int, float], float] = {}
    for count in [count for count in NEIGHBOURS if count < 59]:
        for bandwidth in BANDWIDTHS:
            total[count, bandwidth] = 0.0
            for row in range(0, 60, 1 if left_out == 1000 else 3):
                others = np.arange(60) != row
                said = by_hand(values[row], values[others], truth[others], priors, count, bandwidth)
                total[count, bandwidth] += said[truth[row]]
    head = load_knn(tmp_path)
    assert (int(head.neighbours), pytest.approx(float(head.bandwidth))) == max(total, key=total.__getitem__)


def test_one_setting_may_be_fixed_alone(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    inputs = fit_inputs(clouds(80))
    fit_knn(tmp_path, inputs, neighbours=3)
    assert int(load_knn(tmp_path).neighbours) == 3
    fit_knn(tmp_path, inputs, bandwidth=0.33)
    assert float(load_knn(tmp_path).bandwidth) == pytest.approx(0.33)


def test_equal_images_all_have_one_vote(tmp_path: Path, fit_inputs: Inputs) -> None:
    x, labels = torch.zeros(12, 4) + 0.3, torch.arange(12) % 3
    fit_knn(tmp_path, fit_inputs((x, labels)), neighbours=10, bandwidth=0.1)
    found = load_knn(tmp_path)(torch.stack([x[0], x[0] + 100]))
    assert found.isfinite().all()
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(2))


def test_far_from_the_origin_no_digits_are_lost(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    (x, labels), (queries, _) = clouds(80), clouds(10, seed=1)
    x, queries = (x * 64).round() / 64, (queries * 64).round() / 64  # so that what is added is exact
    fit_knn(tmp_path / "near", fit_inputs((x, labels)), neighbours=5, bandwidth=0.4)
    fit_knn(tmp_path / "far", fit_inputs((x + 65536, labels)), neighbours=5, bandwidth=0.4)
    assert torch.allclose(load_knn(tmp_path / "near")(queries), load_knn(tmp_path / "far")(queries + 65536), atol=1e-4)


def test_no_query_has_no_answer(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    fit_knn(tmp_path, fit_inputs(clouds(80)), neighbours=3)
    assert load_knn(tmp_path)(torch.zeros(0, 5)).shape == (0, 3)


def test_too_few_images_are_refused(tmp_path: Path, clouds: Clouds, fit_inputs: Inputs) -> None:
    inputs = fit_inputs(clouds(8))
    fit_knn(tmp_path, inputs, neighbours=6)
    with pytest.raises(InputError, match="knn: there are 8 training images, at least 9 are needed"):
        fit_knn(tmp_path, inputs, neighbours=7)


@pytest.mark.parametrize(("setting", "message"), [({"neighbours": -1}, "knn.neighbours"), ({"bandwidth": -0.1}, "knn.bandwidth")])
def test_settings_out_of_range_are_refused(
    tmp_path: Path, clouds: Clouds, fit_inputs: Inputs, setting: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit_knn(tmp_path, fit_inputs(clouds(80)), **setting)  # type: ignore[arg-type]
