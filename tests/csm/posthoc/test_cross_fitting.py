import numpy as np
import pytest
import torch

from csm.errors import InputError
from csm.posthoc import POSTHOC, apply_posthoc, fit_posthoc
from csm.posthoc.cross_fitting import can_cross_fit, cross_fitted, least_nll
from csm.reannotation.calibration import stratified_folds

DRAW = np.random.default_rng(0)
LOGITS = torch.from_numpy(DRAW.normal(0, 2, (200, 3)))
LABELS = torch.from_numpy(np.array([DRAW.choice(3, p=p) for p in (LOGITS / 2).softmax(dim=1).numpy()]))


@pytest.mark.parametrize("name", ["temperature", "vector"])
def test_each_row_is_calibrated_by_a_fit_without_its_fold(name):
    found = cross_fitted(name, LOGITS, LABELS)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(200, dtype=torch.float64))
    for fold in stratified_folds(LABELS):
        rest = [row for row in range(200) if row not in set(fold.tolist())]
        expected = apply_posthoc(LOGITS[fold], fit_posthoc(name, LOGITS[rest], LABELS[rest]))
        torch.testing.assert_close(found[fold], expected)


def test_none_is_the_softmax_and_the_least_nll_is_chosen():
    fitted = {name: cross_fitted(name, LOGITS, LABELS) for name in ("none", "temperature")}
    torch.testing.assert_close(fitted["none"], LOGITS.log_softmax(dim=1))
    chosen, scores = least_nll(fitted, LABELS)
    assert chosen == "temperature"  # the logits are twice too large
    assert scores["none"] == pytest.approx(torch.nn.functional.cross_entropy(LOGITS, LABELS).item())
    assert least_nll({"a": fitted["none"], "b": fitted["none"]}, LABELS)[0] == "a"


def test_too_few_rows():
    assert [can_cross_fit(name, 2) for name in ("none", "temperature", "vector")] == [True, True, False]
    assert not can_cross_fit("vector", 12)  # 9 are left for a fit
    assert all(can_cross_fit(name, 13) for name in POSTHOC)
    with pytest.raises(InputError, match="needs at least 10"):
        cross_fitted("vector", LOGITS[:12], LABELS[:12])


def test_folds_are_told():
    done = []
    cross_fitted("temperature", LOGITS, LABELS, on_fold=lambda: done.append(1))
    assert len(done) == 5
