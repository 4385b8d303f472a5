import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from csm.metrics import scores
from csm.metrics.ood import OOD, SCORES, aupr, auroc, fpr95

Measure = Callable[[Tensor, Tensor], Tensor]
# Few values, so that scores tie within and between the sets; infinities, as -inf of an entropy's logarithm might be.
values = st.one_of(st.integers(-3, 3).map(float), st.floats(-5, 5), st.sampled_from([-math.inf, math.inf]))
sets = st.lists(values, min_size=1, max_size=70).map(lambda numbers: torch.tensor(numbers, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(sets, sets)
def test_measures_agree_with_scikit_learn(inside: Tensor, outside: Tensor) -> None:
    is_inside = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    ranks = np.unique(torch.cat([inside, outside]).numpy(), return_inverse=True)[1]  # scikit-learn takes no infinities
    assert auroc(inside, outside).item() == pytest.approx(roc_auc_score(is_inside, ranks), abs=1e-12)
    assert aupr(inside, outside).item() == pytest.approx(average_precision_score(is_inside, ranks), abs=1e-12)
    fpr, tpr, _ = roc_curve(is_inside, ranks, drop_intermediate=False)
    assert fpr95(inside, outside).item() == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min(), abs=1e-12)


@pytest.mark.parametrize("measure", OOD.values())
def test_measures_are_0_dim_float64(measure: Measure) -> None:
    value = measure(torch.tensor([0.5, 1.0], dtype=torch.float16), torch.tensor([0.25]))
    assert value.shape == ()
    assert value.dtype == torch.float64


def test_sets_that_are_apart_the_same_and_swapped() -> None:
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert [measure(high, low).item() for measure in OOD.values()] == [1, 1, 0]
    assert auroc(low, high).item() == 0
    assert fpr95(low, high).item() == 1
    same = torch.full((4,), 2.0)
    assert [measure(same, same[:2]).item() for measure in OOD.values()] == [0.5, pytest.approx(4 / 6), 1]


@pytest.mark.parametrize(("n", "passing"), [(20, 19), (21, 20), (100, 95), (1, 1), (60, 57)])
def test_fpr95_lets_the_least_number_of_inside_images_pass(n: int, passing: int) -> None:
    inside = torch.arange(n, dtype=torch.float64)
    at_threshold = n - passing
    outside = torch.tensor([at_threshold, at_threshold - 0.5], dtype=torch.float64)
    assert fpr95(inside, outside).item() == 0.5


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("block", [8, 2**19])
def test_scores_are_those_of_numpy(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK", block)
    log_probs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    probs = log_probs.double().exp().numpy()
    expected = {"max-softmax": probs.max(axis=1), "entropy": -entropy(probs, axis=1)}[name]
    score = SCORES[name](log_probs)
    assert score.dtype == torch.float64
    np.testing.assert_allclose(score, expected, atol=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_scores_rise_with_certainty(name: str) -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [30.0, 0.0], [800.0, 0.0]], dtype=torch.float64)
    score = SCORES[name](logits.log_softmax(dim=1))
    assert (score.diff() > 0).all()
    assert score[[0, -1]].tolist() == pytest.approx([0.5, 1.0] if name == "max-softmax" else [-math.log(2), 0.0])
    impossible = SCORES[name](torch.tensor([[0.0, -math.inf]]))
    assert impossible.item() == score[-1].item()


@pytest.mark.parametrize("measure", OOD.values())
@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.ones(0), torch.ones(1), r"inside_scores must be .* got torch.float32 \(0,\)"),
        (torch.ones(1), torch.ones(0), r"outside_scores must be .* got torch.float32 \(0,\)"),
        (torch.ones(2, 1), torch.ones(1), r"inside_scores must be .* \(2, 1\)"),
        (torch.ones(1), torch.ones(1).long(), "outside_scores must be .* got torch.int64"),
        (torch.ones(1), torch.tensor([math.nan]), "outside_scores must be .* with nan"),
    ],
)
def test_wrong_scores(measure: Measure, inside: Tensor, outside: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(inside, outside)


@pytest.mark.parametrize("score", SCORES.values())
@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (torch.zeros(3), r"got torch.float32 \(3,\)"),
        (torch.zeros(0, 3), r"\(0, 3\)"),
        (torch.zeros(1, 2).long(), "got torch.int64"),
        (torch.tensor([[0.0, math.nan]]), "with nan"),
    ],
)
def test_wrong_log_probs(score: Callable[[Tensor], Tensor], log_probs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"log_probs must be floating point \(N, K\).*" + message):
        score(log_probs)
