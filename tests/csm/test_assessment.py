import numpy as np
import pytest
import torch

from csm.assessment import FEWEST, assess, chance_ece, ece_interval
from csm.metrics import METRICS, evaluate


def confidences(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).beta(3, 1, count) * 0.9 + 0.1)


def outcomes(chance, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(len(chance))) < chance


def logits_and_labels(count=400, k=4, sharp=1.0, seed=0):
    """Labels drawn from the softmax of logits, which are then made ``sharp`` times as large."""
    draw = np.random.default_rng(seed)
    logits = torch.from_numpy(draw.normal(0, 2, (count, k)))
    labels = torch.from_numpy(np.array([draw.choice(k, p=p) for p in logits.softmax(dim=1).numpy()]))
    return (sharp * logits).log_softmax(dim=1), labels


def brute_ece(confidence, correct, bins):
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return sum(abs((correct[index == b] - confidence[index == b]).sum()) for b in range(bins)) / len(confidence)


def test_chance_is_the_ece_of_outcomes_drawn_image_by_image():
    confidence = confidences(300)
    draw = np.random.default_rng(1)
    drawn = [brute_ece(confidence.numpy(), draw.random(300) < confidence.numpy(), 15) for _ in range(2000)]
    found = chance_ece(confidence, 15, draws=4000)
    assert found.mean().item() == pytest.approx(np.mean(drawn), rel=0.02)
    assert found.std().item() == pytest.approx(np.std(drawn), rel=0.06)


def test_chance_is_less_with_more_images_and_none_where_nothing_is_left_to_chance():
    few, many = (chance_ece(confidences(count)).mean().item() for count in (100, 10_000))
    assert many < few / 5
    assert chance_ece(torch.ones(50)).abs().max() == 0


@pytest.mark.parametrize(
    ("images", "accuracy"),
    [
        (60, lambda c: c),
        (60, lambda c: 0.95 * c),
        (600, lambda c: c**1.4),
    ],
)
def test_the_interval_holds_the_true_ece_and_rarely_lies_above_it(images, accuracy):
    known = confidences(200_000, seed=9)
    truth = brute_ece(known.numpy(), accuracy(known).numpy(), 15)
    above, held = 0, 0
    for trial in range(40):
        confidence = confidences(images, seed=trial)
        low, high = ece_interval(confidence, outcomes(accuracy(confidence), seed=trial + 1000), draws=200)
        above += low > truth
        held += low <= truth <= high
    assert above <= 4  # 2.5 % are meant; the gaps of the bins are not known exactly, and the draws are few
    assert held >= 36


def test_the_interval_holds_the_measured_ece_and_begins_at_0_where_chance_explains_it():
    confidence = confidences(200)
    calibrated, wrong = outcomes(confidence), outcomes(0.5 * confidence)
    low, high = ece_interval(confidence, calibrated)
    assert low == 0
    assert brute_ece(confidence.numpy(), calibrated.numpy(), 15) <= high
    low, high = ece_interval(confidence, wrong)
    assert 0.25 < low <= brute_ece(confidence.numpy(), wrong.numpy(), 15) <= high < 0.5
    assert ece_interval(confidence, wrong) == (low, high)  # the draws are seeded


def test_one_image_and_certain_predictions_have_an_interval():
    assert ece_interval(torch.tensor([0.7]), torch.tensor([True]))[0] == 0
    assert ece_interval(torch.ones(20), torch.ones(20, dtype=torch.bool)) == (0, 0)
    low, high = ece_interval(torch.ones(20), torch.zeros(20, dtype=torch.bool))
    assert low == pytest.approx(0.025 ** (1 / 20), abs=0.01)  # Clopper and Pearson: the accuracy may be above 0 all the same
    assert high == 1


def test_every_metric_has_the_value_of_csm_metrics_inside_its_interval():
    log_probs, labels = logits_and_labels(sharp=2)
    found = assess(log_probs, labels, draws=300, resamples=60)
    assert (found.images, list(found.metrics)) == (400, list(METRICS))
    values = evaluate(log_probs, labels)
    for name, estimate in found.metrics.items():
        assert estimate.value == values[name]
        assert estimate.low is not None
        assert estimate.low <= estimate.value <= estimate.high, name
    assert found.metrics["ece"].low > 0.02  # twice too sharp
    assert found.chance.low < found.chance.value < found.chance.high < found.metrics["ece"].value


def test_the_interval_of_the_accuracy_is_that_of_a_binomial():
    log_probs, labels = logits_and_labels(count=2000)
    accuracy = assess(log_probs, labels, resamples=0).metrics["accuracy"]
    error = (accuracy.value * (1 - accuracy.value) / 2000) ** 0.5
    assert accuracy.low == pytest.approx(accuracy.value - 1.96 * error, abs=0.15 * error)
    assert accuracy.high == pytest.approx(accuracy.value + 1.96 * error, abs=0.15 * error)


def test_too_much_work_leaves_intervals_out_and_measures_all_the_same(monkeypatch):
    log_probs, labels = logits_and_labels()
    monkeypatch.setattr("csm.assessment.WORK", log_probs.numel() * (FEWEST - 1))
    metrics = assess(log_probs, labels, draws=100).metrics
    assert metrics["aurc"].low is None
    assert metrics["aurc"].value == evaluate(log_probs, labels)["aurc"]
    assert None not in (metrics["ece"].low, metrics["nll"].low)


def test_a_level_outside_is_refused():
    with pytest.raises(ValueError, match="level must lie inside"):
        ece_interval(torch.tensor([0.5]), torch.tensor([True]), level=1.0)
