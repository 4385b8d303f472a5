"""Sparse labels against the dense rows that they stand for."""

import math

import numpy as np
import pytest
import torch

from csm.classifiers import Classifier, ClassifierSpec, build_classifier
from csm.methods import Method, MixedTerm
from csm.optimization import OptimizerConfig
from csm.schedules import MixedSet, Schedule, soften
from csm.sparse_labels import SparseLabels, rows_of
from csm.training import fit

ROWS, CLASSES = 12, 9


def labels(top: int, seed: int = 0, certain: bool = False) -> SparseLabels:
    draw = np.random.default_rng(seed)
    classes = np.stack([draw.permutation(CLASSES)[:top] for _ in range(ROWS)]).astype(np.int32)
    mass = draw.dirichlet(np.ones(top + 1), ROWS)
    if certain:
        mass[0] = [1.0, *[0.0] * top]
        mass[1, -1], mass[1, 0] = 0.0, mass[1, 0] + mass[1, -1]  # nothing for the others
    probs, rest = mass[:, :-1], mass[:, -1] / (CLASSES - top)
    return SparseLabels(torch.from_numpy(classes), torch.from_numpy(probs).float(), torch.from_numpy(rest).float(), CLASSES)


def by_hand(sparse: SparseLabels) -> np.ndarray:
    dense = np.empty((len(sparse), CLASSES))
    for row in range(len(sparse)):
        dense[row] = float(sparse.rest[row])
        for k, p in zip(sparse.classes[row].tolist(), sparse.probs[row].tolist(), strict=True):
            dense[row, k] = p
    return dense


@pytest.mark.parametrize("top", [1, 2, 5, 8])
def test_the_dense_rows_hold_each_class_once(top: int) -> None:
    sparse = labels(top)
    assert sparse.dense().numpy() == pytest.approx(by_hand(sparse))
    assert sparse.dense().sum(dim=1).numpy() == pytest.approx(1)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 2.0, 30.0])
def test_softened_and_entropies_are_those_of_the_dense_rows(temperature: float) -> None:
    sparse = labels(3, certain=True)
    softened = soften(sparse, temperature)
    assert isinstance(softened, SparseLabels)
    expected = by_hand(sparse) ** (1 / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    assert softened.dense().numpy() == pytest.approx(expected, abs=1e-6)
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in by_hand(softened)]
    assert softened.entropies().numpy() == pytest.approx(entropy, abs=1e-5)


def test_rows_are_chosen_as_of_a_tensor() -> None:
    sparse, rows = labels(4), torch.tensor([3, 3, 0, 11])
    assert torch.equal(rows_of(sparse, rows), sparse.dense()[rows])
    assert torch.equal(rows_of(sparse.dense(), rows), sparse.dense()[rows])
    assert len(sparse[rows]) == 4
    assert sparse.nbytes == ROWS * (4 * (4 + 4) + 4)


def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ClassifierSpec("small-cnn", {"width": 4}, 1, tuple(map(str, range(CLASSES))), (0.5,), (0.2,)))


def test_a_training_on_sparse_labels_is_that_on_the_dense_ones() -> None:
    """Of the same images, with sets left out, a temperature, and the schedule that looks at the labels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (ROWS, 1, 8, 8), dtype=torch.uint8, generator=draw)
    real = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=draw), torch.arange(20) % CLASSES
    sparse = labels(3)
    sets = torch.arange(ROWS).view(4, 3), torch.tensor([0, 0, 2, 2]), torch.tensor([1, 1, 3, 3]), torch.tensor([0.0, 0.5, 1.0])
    method = Method(mixed=MixedTerm(loss="kl", schedule="ambiguity", sets=1, temperature=1.5))
    optimizer = OptimizerConfig(epochs=2, batch_size=10, learning_rate=0.01)
    weights = []
    for given in (sparse, sparse.dense()):
        mixed = MixedSet(images, given, *sets)
        draws = Schedule("ambiguity", 2, mixed, CLASSES).draw(torch.arange(6), torch.Generator().manual_seed(1))
        weights.append((draws, fit(classifier(), real, real, method, optimizer, 0, mixed=mixed).state_dict()))
    assert torch.equal(weights[0][0], weights[1][0])
    for name, tensor in weights[0][1].items():
        assert torch.allclose(tensor, weights[1][1][name], atol=1e-5), name
