import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor

from csm.metrics import METRICS, calibration, evaluate, scores
from csm.metrics.scores import accuracy, brier, nll, nll_from_log_probs
from csm.posthoc import apply_temperature

Score = Callable[[Tensor, Tensor], Tensor]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, k = draw(st.integers(1, 30)), draw(st.integers(2, 8))
    cells = st.floats(-30, 30, width=32)
    logits = draw(st.lists(st.lists(cells, min_size=k, max_size=k), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_scores_agree_with_scikit_learn(case: tuple[Tensor, Tensor]) -> None:
    logits, labels = case
    probs, classes = logits.softmax(dim=1), range(logits.shape[1])
    p, y = probs.numpy(), labels.numpy()
    assert accuracy(probs, labels).item() == accuracy_score(y, p.argmax(axis=1))
    # scikit-learn clips at 2e-16, which +-30 can reach
    clipped = probs.clamp(min=2.3e-16)
    clipped = clipped / clipped.sum(dim=1, keepdim=True)
    assert nll(clipped, labels).item() == pytest.approx(log_loss(y, clipped.numpy(), labels=classes), abs=1e-9)
    if len(classes) == 2:  # there scikit-learn wants the second column, and counts it twice on request
        expected = brier_score_loss(y, p[:, 1], labels=[0, 1], scale_by_half=False)
    else:
        expected = brier_score_loss(y, p, labels=classes, scale_by_half=False)
    assert brier(probs, labels).item() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_nll_is_cross_entropy(case: tuple[Tensor, Tensor]) -> None:
    logits, labels = case
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert nll(logits.softmax(dim=1), labels).item() == pytest.approx(expected, abs=1e-9)
    assert nll_from_log_probs(logits.log_softmax(dim=1), labels).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("score", [accuracy, brier, nll])
def test_values_are_0_dim_float64(score: Score) -> None:
    value = score(torch.tensor([[0.5, 0.5]], dtype=torch.float16), torch.tensor([0], dtype=torch.uint8))
    assert value.shape == ()
    assert value.dtype == torch.float64


def test_uniform_rows_tie_and_predict_class_0() -> None:
    probs, labels = torch.full((4, 4), 0.25), torch.arange(4)
    assert accuracy(probs, labels).item() == 0.25
    assert nll(probs, labels).item() == pytest.approx(math.log(4))
    assert brier(probs, labels).item() == 0.75


def test_certain_predictions_are_the_extremes() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]])
    right, wrong = torch.tensor([0]), torch.tensor([1])
    assert [f(probs, right).item() for f in (accuracy, brier, nll)] == [1, 0, 0]
    assert [f(probs, wrong).item() for f in (accuracy, brier, nll)] == [0, 2, math.inf]
    assert math.copysign(1, nll(probs, right).item()) == 1  # not -0.0
    assert math.copysign(1, nll_from_log_probs(probs.log(), right).item()) == 1


def test_nll_keeps_what_float32_would_lose() -> None:
    probs = torch.tensor([[1e-300, 1.0]], dtype=torch.float64)
    assert nll(probs, torch.tensor([0])).item() == pytest.approx(300 * math.log(10))


def test_one_of_two_certain_mistakes_does_not_hide_in_the_mean() -> None:
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert nll(probs, torch.tensor([0, 1])).item() == math.inf


@pytest.mark.parametrize("score", [metric.function for metric in METRICS.values()])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3).long(), r"probs must have shape \(N, K\).* got \(3,\)"),
        (torch.ones(0, 3), torch.zeros(0).long(), r"N >= 1 .* got \(0, 3\)"),
        (torch.ones(3, 1), torch.zeros(3).long(), r"K >= 2, got \(3, 1\)"),
        (torch.tensor([[0, 1]]), torch.tensor([0]), "probs must be floating point, got torch.int64"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), r"labels must have shape \(1,\).* got \(2,\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([[0]]), r"labels must have shape \(1,\).* got \(1, 1\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]), "labels must be integers, got torch.float32"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([True]), "labels must be integers, got torch.bool"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"labels must lie in 0\.\.1, got values from 2 to 2"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), r"labels must lie in 0\.\.1, got values from -1"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), r"probs must lie in \[0, 1\].* from -0.5 to 1.5"),
        (torch.tensor([[0.5, torch.nan]]), torch.tensor([0]), r"probs must lie in \[0, 1\] without nan"),
        (torch.tensor([[0.5, 0.25]]), torch.tensor([0]), "must sum to 1, got one that is off by 0.25"),
    ],
)
def test_wrong_arguments(score: Score, probs: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(probs, labels)


@pytest.mark.parametrize("log_probs", [[[0.5, -1.0]], [[-1.0, math.nan]]])
def test_log_probs_that_are_none(log_probs: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="log_probs must be <= 0 without nan"):
        nll_from_log_probs(torch.tensor(log_probs), torch.tensor([0]))


@pytest.fixture
def logits_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_evaluate_is_each_metric_on_the_tempered_softmax(logits_and_labels: tuple[Tensor, Tensor], temperature: float) -> None:
    logits, labels = logits_and_labels
    probs = apply_temperature(logits, temperature).exp()
    values = evaluate(logits, labels, temperature, n_bins=7)
    assert list(values) == list(METRICS)
    for name, metric in METRICS.items():
        expected = metric.function(probs, labels, 7) if metric.binned else metric.function(probs, labels)
        assert type(values[name]) is float
        assert values[name] == pytest.approx(expected.item(), abs=1e-12)


def test_evaluate_bins_as_told(logits_and_labels: tuple[Tensor, Tensor]) -> None:
    coarse, fine = (evaluate(*logits_and_labels, n_bins=n) for n in (1, 15))
    assert {name for name in METRICS if coarse[name] != fine[name]} == {name for name in METRICS if METRICS[name].binned}


def test_the_metrics_of_the_tables_keep_names_and_order() -> None:
    assert [name for name in METRICS if name in ("brier", "nll", "aece", "ece", "accuracy")] == [
        "accuracy",
        "ece",
        "aece",
        "nll",
        "brier",
    ]
    assert set(METRICS) == {
        *("accuracy", "ece", "aece", "classwise_ece", "mce", "ks", "oe", "ue", "nll", "brier"),
        *("brier_reliability", "brier_resolution", "brier_uncertainty", "l2_ce_debiased", "smooth_ece", "aurc"),
    }


@pytest.mark.parametrize("name", METRICS)
def test_blocks_do_not_change_a_metric(
    name: str, logits_and_labels: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(*logits_and_labels, metrics=[name])[name]
    for module in (scores, calibration):
        monkeypatch.setattr(module, "BLOCK", 35)  # 7 rows of 5 classes, 1 class of 200 images
    assert evaluate(*logits_and_labels, metrics=[name])[name] == pytest.approx(whole, abs=1e-14)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "aece" and name != "l2_ce_debiased"])
def test_the_order_of_the_images_does_not_matter(name: str) -> None:
    """Many equal confidences; equal-mass bins (aece, l2_ce_debiased) split those by the order of the images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (60, 3), generator=generator).double()
    labels = torch.randint(0, 3, (60,), generator=generator)
    order = torch.randperm(60, generator=generator)
    value = evaluate(logits, labels, metrics=[name])[name]
    assert evaluate(logits[order], labels[order], metrics=[name])[name] == pytest.approx(value, abs=1e-13)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_0_dim_float64_and_bounded_at_the_extremes(name: str) -> None:
    """One image, and confidences of exactly 0 and 1: right, wrong, and as many of both."""
    metric = METRICS[name].function
    certain = torch.tensor([[1.0, 0.0]])
    for probs, labels in (
        (certain, torch.tensor([0])),
        (certain, torch.tensor([1])),
        (certain.repeat(4, 1), torch.tensor([0, 1, 0, 1])),
        (torch.tensor([[0.5, 0.5]], dtype=torch.float16), torch.tensor([1], dtype=torch.uint8)),
    ):
        value = metric(probs, labels)
        assert value.shape == ()
        assert value.dtype == torch.float64
        if name != "nll":  # inf is its value for a certain mistake
            assert -2 <= value.item() <= 2
    perfect = 1.0 if name == "accuracy" else 0.0
    assert metric(certain, torch.tensor([0])).item() == pytest.approx(perfect, abs=1e-12)


def test_evaluate_picks_metrics_in_order(logits_and_labels: tuple[Tensor, Tensor]) -> None:
    everything = evaluate(*logits_and_labels)
    some = evaluate(*logits_and_labels, metrics=("nll", "ece"))
    assert list(some.items()) == [("nll", everything["nll"]), ("ece", everything["ece"])]


def test_evaluate_stays_exact_where_softmax_underflows() -> None:
    logits, labels = torch.tensor([[0.0, 1e4], [3e38, -3e38]]), torch.tensor([0, 0])
    values = evaluate(logits, labels, metrics=("accuracy", "ece", "aece", "nll", "brier"))
    assert values == {"accuracy": 0.5, "ece": 0.5, "aece": 0.5, "nll": 5000.0, "brier": 1.0}
    assert evaluate(logits, labels, temperature=0.01)["nll"] == pytest.approx(5e5, rel=1e-12)
    assert evaluate(logits, 1 - labels)["nll"] == pytest.approx(3e38, rel=1e-6)
    assert nll(logits.softmax(dim=1), labels).item() == math.inf  # what the probabilities alone would say


@pytest.mark.parametrize("k", range(3, 21))
def test_evaluate_keeps_a_uniform_row_on_its_bin_edge(k: int) -> None:
    """With K bins, 1/K closes the first; a row of confidence 1.5/K and opposite gap would share its bin."""
    other = torch.full((k,), (1 - 1.5 / k) / (k - 1), dtype=torch.float64)
    other[0] = 1.5 / k
    logits = torch.stack([torch.zeros(k, dtype=torch.float64), other.log()])
    value = evaluate(logits, torch.tensor([0, 1]), n_bins=k)["ece"]
    assert value == pytest.approx(((1 - 1 / k) + 1.5 / k) / 2)


def test_evaluate_takes_half_and_logits_with_a_graph(logits_and_labels: tuple[Tensor, Tensor]) -> None:
    logits, labels = logits_and_labels
    assert evaluate(logits.clone().requires_grad_(), labels) == evaluate(logits, labels)
    half = logits.half()
    assert evaluate(half, labels.to(torch.uint8)) == evaluate(half.double(), labels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_evaluate_refuses_logits_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="logits must be finite, got nan or inf in 1 of 2 rows"):
        evaluate(torch.tensor([[0.0, value], [0.0, 1.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([3])}, r"labels must lie in 0\.\.2, got values from 3 to 3"),
        ({"labels": torch.tensor([0, 1])}, r"labels must have shape \(1,\) to match logits, got \(2,\)"),
        ({"logits": torch.zeros(0, 3)}, r"logits must have shape \(N, K\) .* got \(0, 3\)"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be finite and > 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and > 0, got inf"),
        ({"n_bins": 0}, "n_bins must be an int > 0, got 0"),
        ({"metrics": ["ece", "mse"]}, "metrics must be names among accuracy, .*, got mse"),
    ],
)
def test_evaluate_refuses(changes: dict[str, object], message: str) -> None:
    arguments = {"logits": torch.zeros(1, 3), "labels": torch.tensor([0])} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments)  # type: ignore[arg-type]
