from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from csm.errors import InputError
from csm.reannotation.calibration import choose, fit_calibration, held_out_shares, stratified_folds
from csm.reannotation.calibrators import CALIBRATORS, Calibration, apply_calibration

CLASSES = 3
NAN, INF = float("nan"), float("inf")
POSTERIOR = [name for name, kind in CALIBRATORS.items() if kind.fit_posterior]
Sample = tuple[torch.Tensor, torch.Tensor]


def others(shares: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return np.array([shares[i, k] for i in range(len(labels)) for k in range(shares.shape[1]) if k != labels[i]], dtype=float)


def test_a_given_scale_is_kept_and_measured(held_out_pairs: Sample) -> None:
    table, labels = held_out_pairs
    calibration = fit_calibration("scale", None, table, labels, scale=4.0)
    assert calibration.scale == 4.0
    assert calibration.nll == pytest.approx(np.log1p(np.exp(-4 * (others(table, labels) - 0.5))).mean())
    assert calibration.nll == pytest.approx(calibration.nll_after)


@pytest.mark.parametrize("calibrator", POSTERIOR)
def test_the_compared_nll_is_of_images_that_the_fit_did_not_see(held_out_posterior: Sample, calibrator: str) -> None:
    scores, labels = held_out_posterior[0][:200], held_out_posterior[1][:200]
    total = 0.0
    for fold in stratified_folds(labels):
        rest = torch.tensor([i for i in range(200) if i not in set(fold.tolist())])
        fitted = fit_calibration(calibrator, scores[rest], None, labels[rest])
        total += cross_entropy(apply_calibration(scores[fold], fitted), labels[fold], reduction="sum").item()
    calibration = fit_calibration(calibrator, scores, None, labels)
    assert calibration.nll == pytest.approx(total / 200)
    if calibrator == "none":
        assert calibration.nll == pytest.approx(calibration.nll_before) == calibration.nll_after
    else:
        assert calibration.nll > calibration.nll_after


def test_the_compared_nll_of_pairs_is_of_images_that_the_fit_did_not_see(held_out_pairs: Sample) -> None:
    table, labels = held_out_pairs
    total = 0.0
    for fold in stratified_folds(labels):
        rest = torch.tensor([i for i in range(300) if i not in set(fold.tolist())])
        scale = fit_calibration("scale", None, table[rest], labels[rest]).scale
        total += np.log1p(np.exp(-scale * (others(table[fold], labels[fold]) - 0.5))).sum()
    assert fit_calibration("scale", None, table, labels).nll == pytest.approx(total / 600)


def test_folds_are_stratified_and_hold_every_image_once() -> None:
    labels = torch.tensor([0] * 23 + [1] * 5 + [2] * 2)[torch.randperm(30, generator=torch.Generator().manual_seed(3))]
    folds = list(stratified_folds(labels))
    assert sorted(torch.cat(folds).tolist()) == list(range(30))
    counts = np.array([np.bincount(labels[fold], minlength=3) for fold in folds])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    assert (counts.sum(axis=1) == 6).all()
    assert all(torch.equal(*both) for both in zip(folds, stratified_folds(labels), strict=True))
    assert [len(fold) for fold in stratified_folds(torch.tensor([0, 1]))] == [1, 1]


@pytest.mark.parametrize(("count", "words"), [(9, "class 2 has 9"), (0, "class 2 has 0")])
@pytest.mark.parametrize("calibrator", ["vector", "isotonic"])
def test_too_few_images_of_a_class_fall_back(
    held_out_posterior: Sample, held_out_pairs: Sample, calibrator: str, count: int, words: str
) -> None:
    for scores, labels, instead in ((*held_out_posterior, "temperature"), (*held_out_pairs, "scale")):
        rows = torch.cat([(labels < 2).nonzero()[:, 0], (labels == 2).nonzero()[:count, 0]])
        arguments = (scores[rows], None) if instead == "temperature" else (None, scores[rows])
        if instead == "scale" and calibrator == "vector":
            continue
        calibration = fit_calibration(calibrator, *arguments, labels[rows])
        assert calibration.note == f"{calibrator} needs 10 held-out images of each class, {words}: {instead} instead"
        assert calibration == replace(fit_calibration(instead, *arguments, labels[rows]), note=calibration.note)


def test_ten_images_of_each_class_are_enough(held_out_posterior: Sample) -> None:
    scores, labels = held_out_posterior
    rows = torch.cat([(labels == k).nonzero()[:10, 0] for k in range(CLASSES)])
    for calibrator in ("vector", "isotonic"):
        assert fit_calibration(calibrator, scores[rows], None, labels[rows]).calibrator == calibrator


@pytest.mark.parametrize("calibrator", [name for name in CALIBRATORS if name != "none"])
def test_a_head_that_says_nothing_of_a_real_image_has_nothing_to_fit(calibrator: str) -> None:
    labels = torch.tensor([0, 1])
    assert fit_calibration("none", None, None, labels) == Calibration("none", pair=True)
    with pytest.raises(InputError, match=f"calibrator {calibrator} has nothing to be fitted on"):
        fit_calibration(calibrator, None, None, labels)


def test_calibrators_are_named_with_the_heads_they_are_for(held_out_posterior: Sample, held_out_pairs: Sample) -> None:
    with pytest.raises(InputError, match="calibrator sharpen is unknown: take one of none, scale, temperature, vector, isotonic"):
        fit_calibration("sharpen", held_out_posterior[0], None, held_out_posterior[1])
    with pytest.raises(
        InputError, match="scale is not for a head that knows all classes: take one of none, temperature, vector, iso"
    ):
        fit_calibration("scale", held_out_posterior[0], None, held_out_posterior[1])
    with pytest.raises(InputError, match="vector is not for a head that knows only the pair: take one of none, scale, isotonic"):
        fit_calibration("vector", None, *held_out_pairs)


@pytest.mark.parametrize(("calibrator", "scale"), [("isotonic", 4.0), ("scale", 0.0), ("scale", NAN), ("scale", INF)])
def test_a_scale_that_makes_no_sense_is_refused(held_out_pairs: Sample, calibrator: str, scale: float) -> None:
    with pytest.raises(InputError, match="scale must be > 0 and goes with calibrator scale alone"):
        fit_calibration(calibrator, None, *held_out_pairs, scale=scale)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_annotations_of_real_images_must_be_finite_and_more_than_one(held_out_posterior: Sample, bad: float) -> None:
    scores, labels = held_out_posterior[0].clone(), held_out_posterior[1]
    with pytest.raises(InputError, match="1 held-out images; expected at least 2"):
        fit_calibration("temperature", scores[:1], None, labels[:1])
    scores[5, 1] = bad
    with pytest.raises(InputError, match="not finite"):
        fit_calibration("temperature", scores, None, labels)


class Distances:
    """A pair head of one number for each class, at 0, 10 and 30."""

    def annotate(
        self, features: Mapping[str, torch.Tensor], class_a: torch.Tensor, class_b: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        assert (class_a != class_b).all()  # the projection is undefined there
        places = torch.tensor([0.0, 10.0, 30.0])
        return (features["x"][:, 0] - places[class_b]) / (places[class_a] - places[class_b]), None


def test_held_out_shares_are_of_the_own_class_against_each_other() -> None:
    found = held_out_shares(Distances(), {"x": torch.tensor([[1.0], [12.0], [30.0]])}, torch.tensor([0, 1, 2]), CLASSES)
    expected = [[1, 9 / 10, 29 / 30], [12 / 10, 1, 18 / 20], [1, 1, 1]]
    assert torch.allclose(found, torch.tensor(expected))


def test_the_choice_is_that_of_least_cross_fitted_nll() -> None:
    def measured(nll: float) -> Calibration:
        return Calibration("temperature", images=500, nll_before=0.0, nll_after=9 - nll, nll=nll, temperature=1.0)

    candidates = {"lda": measured(0.9), "qda-pixels": measured(0.61), "teacher": measured(0.73), "same": measured(0.61)}
    assert choose(candidates) == ("qda-pixels", "qda-pixels: NLL 0.61 on 500 validation images, next same 0.61")
    del candidates["same"]
    assert choose(candidates)[1] == "qda-pixels: NLL 0.61 on 500 validation images, next teacher 0.73"
    assert choose({"lda": candidates["lda"]}) == ("lda", "lda: NLL 0.9 on 500 validation images")


def test_annotators_of_pairs_are_no_candidates(held_out_posterior: Sample, held_out_pairs: Sample) -> None:
    lda = fit_calibration("none", held_out_posterior[0], None, held_out_posterior[1])
    for bad in (fit_calibration("scale", None, *held_out_pairs), replace(lda, pair=True), Calibration("none", pair=True)):
        with pytest.raises(InputError, match="x gives no probability outside the pair, so its NLL over all classes is infinite"):
            choose({"lda": lda, "x": bad})
    with pytest.raises(InputError, match="candidates is empty"):
        choose({})
