"""Deep ensembles: their probabilities against a loop in numpy, and what is saved of them."""

import numpy as np
import pytest
import torch

from csm.classifiers import ClassifierSpec, build_classifier, build_ensemble, load_classifier, mean_log_probs

SPEC = ClassifierSpec("small-cnn", {"width": 4}, 1, ("a", "b", "c"), (0.4,), (0.2,))


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


@pytest.mark.parametrize(("members", "scale"), [(1, 1.0), (3, 1.0), (5, 200.0)])
def test_the_mean_is_that_of_probabilities_and_not_of_logits(members: int, scale: float) -> None:
    logits = scale * np.random.default_rng(0).normal(size=(members, 6, 4))
    found = mean_log_probs(torch.from_numpy(logits))
    assert found.isfinite().all()
    for row in range(6):
        expected = sum(softmax(logits[member, row]) for member in range(members)) / members
        np.testing.assert_allclose(found[row].exp().numpy(), expected, atol=1e-12)
    certain = torch.tensor([[[0.0, -1e30]], [[-1e30, 0.0]]])
    assert mean_log_probs(certain).exp().tolist() == [[0.5, 0.5]]


def test_an_ensemble_says_what_its_members_say_in_the_mean_and_comes_back_from_a_file(tmp_path) -> None:
    torch.manual_seed(0)
    members = [build_classifier(SPEC).eval() for _ in range(3)]
    ensemble = build_ensemble(members)
    images = torch.randint(0, 256, (5, 1, 6, 6), dtype=torch.uint8)
    with torch.no_grad():
        expected = sum(member(images).softmax(dim=1) for member in members) / 3
        torch.testing.assert_close(ensemble(images).exp(), expected, atol=1e-6, rtol=0)
        assert torch.equal(ensemble.features(images), torch.cat([member.features(images) for member in members], dim=1))
        ensemble.save(tmp_path)
        again = load_classifier(tmp_path)
        assert again.spec.members == 3
        assert torch.equal(again(images), ensemble(images))
