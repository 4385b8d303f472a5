import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from csm.metrics import METRICS
from csm.truth import compare, tv

CLASSES = 4


def distributions(rows: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(CLASSES, 0.7), rows))


def pairs(rows: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    both = np.array([draw.permutation(CLASSES)[:2] for _ in range(rows)])
    return torch.from_numpy(both[:, 0]), torch.from_numpy(both[:, 1])


def test_every_distance_is_its_definition() -> None:
    labels, truth = distributions(300, 0), distributions(300, 1)
    class_a, class_b = pairs(300)
    found = compare(labels, truth, class_a, class_b)
    rows = list(zip(labels.tolist(), truth.tolist(), class_a.tolist(), class_b.tolist(), strict=True))
    mean = {
        "tv": [sum(abs(x - y) for x, y in zip(p, t, strict=True)) / 2 for p, t, *_ in rows],
        "kl": [entropy(t, p) for p, t, *_ in rows],
        "pair_error": [abs(p[a] / (p[a] + p[b]) - t[a] / (t[a] + t[b])) for p, t, a, b in rows],
        "outside_mass": [sum(p[k] for k in range(CLASSES) if k not in (a, b)) for p, _, a, b in rows],
        "outside_truth": [sum(t[k] for k in range(CLASSES) if k not in (a, b)) for _, t, a, b in rows],
        "entropy": [entropy(p) for p, *_ in rows],
        "entropy_truth": [entropy(t) for _, t, *_ in rows],
    }
    gaps = [0.0] * 15
    for p, t, *_ in rows:
        top = max(p)
        gaps[math.ceil(15 * top) - 1] += (t[p.index(top)] - top) / len(rows)
    assert found == pytest.approx({**{name: np.mean(values) for name, values in mean.items()}, "ece": np.abs(gaps).sum()})
    assert tv(labels, truth) == found["tv"]


def test_the_ece_is_the_one_of_endless_draws() -> None:
    labels, truth = distributions(40, 0), distributions(40, 1)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(truth, 5000, replacement=True, generator=draw)  # (40, 5000)
    sampled = METRICS["ece"].function(labels.repeat_interleave(5000, dim=0), drawn.flatten())
    assert compare(labels, truth, *pairs(40))["ece"] == pytest.approx(sampled.item(), abs=0.003)


def test_the_truth_itself_is_at_no_distance() -> None:
    truth = distributions(50, 0)
    truth[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # certain
    found = compare(truth, truth, *pairs(50))
    for name in ("tv", "kl", "pair_error", "ece"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    assert found["outside_mass"] == found["outside_truth"]
    assert found["entropy"] == found["entropy_truth"]


def test_labels_of_two_classes_are_infinitely_far_in_kl_only() -> None:
    truth = torch.tensor([[0.3, 0.3, 0.4, 0.0]])
    found = compare(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), truth, torch.tensor([0]), torch.tensor([1]))
    assert found["kl"] == math.inf
    assert found["tv"] == pytest.approx(0.4)
    assert found["pair_error"] == 0
    assert found["outside_mass"] == 0
    assert found["outside_truth"] == pytest.approx(0.4)
    assert found["ece"] == pytest.approx(0.2)  # says 0.5 of class 0, which has 0.3


def test_images_without_a_ratio_do_not_count_for_it() -> None:
    truth = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.2, 0.8, 0.0, 0.0]])
    labels = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.3, 0.7, 0.0, 0.0]])
    zero, one = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    assert compare(labels, truth, zero, one)["pair_error"] == pytest.approx(0.1)
    assert math.isnan(compare(labels[:2], truth[:2], zero[:2], one[:2])["pair_error"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": torch.full((3, 2), 0.5)}, "shape of the labels"),
        ({"truth": torch.full((3, CLASSES), 0.5)}, "sum to 1"),
        ({"labels": torch.full((3, CLASSES), math.nan)}, "without nan"),
        ({"class_a": torch.tensor([0, 1, CLASSES])}, r"0\.\.3"),
        ({"class_b": torch.tensor([0, 1, 0])}, "differ"),
    ],
)
def test_what_is_no_distribution_or_pair_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    flat = torch.full((3, CLASSES), 1 / CLASSES)
    arguments = {"labels": flat, "truth": flat, "class_a": torch.tensor([0, 1, 2]), "class_b": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match=message):
        compare(**{**arguments, **change})
