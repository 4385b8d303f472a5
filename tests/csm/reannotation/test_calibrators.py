from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax
from sklearn.isotonic import IsotonicRegression
from torch.nn.functional import cross_entropy

from csm import storage, tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.posthoc import fit_temperature
from csm.reannotation.calibrators import (
    CALIBRATORS,
    Calibration,
    apply_calibration,
    choose,
    describe,
    fit_calibration,
    held_out_shares,
    soft_labels,
    stratified_folds,
)

CLASSES = 3
NAN, INF = float("nan"), float("inf")
POSTERIOR = [name for name, kind in CALIBRATORS.items() if kind.fit_posterior]
PAIR = [name for name, kind in CALIBRATORS.items() if kind.fit_share]

Sample = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def plan() -> pl.DataFrame:
    return make_plan(CLASSES, "data", "net", PlanConfig(ratios=3, sets_per_pair=1))


@pytest.fixture(scope="module")
def posterior() -> Sample:
    """Log-posteriors (600, 3) that are three times too certain and lean to class 0, and labels."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(600, CLASSES, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    return (3 * truth + torch.tensor([3.0, 0.0, 0.0])).log_softmax(dim=1).float(), labels


@pytest.fixture(scope="module")
def shares() -> Sample:
    """Shares (300, 3) whose log-odds are 6 (share - 0.5), and labels."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (300,), generator=draw)
    share = 0.5 + 0.8 * torch.randn(300, CLASSES, generator=draw)
    own = torch.rand(300, CLASSES, generator=draw) < torch.sigmoid(6 * (share - 0.5))
    return torch.where(own, share, 1 - share), labels


def others(shares: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    return np.array([shares[i, k] for i in range(len(labels)) for k in range(shares.shape[1]) if k != labels[i]], dtype=float)


def annotated(plan: pl.DataFrame, share: list[float | None], posterior: list[list[float] | None]) -> pl.DataFrame:
    frame = pl.DataFrame(
        {
            "mix_id": plan["mix_id"].head(len(share)),
            "lam_raw": pl.Series(share, dtype=pl.Float32),
            "log_posterior": pl.Series(posterior, dtype=pl.Array(pl.Float32, CLASSES)),
        }
    )
    return tables.check(frame, tables.annotations(CLASSES))


def by_id(labels: pl.DataFrame) -> dict[str, list[float]]:
    return dict(zip(labels["mix_id"].to_list(), labels["soft_label"].to_list(), strict=True))


# --- labels as they are read


@pytest.mark.parametrize(
    ("calibration", "formula"),
    [
        (Calibration("none", pair=True), lambda share: min(max(share, 0), 1)),
        (Calibration("scale", pair=True, scale=0.5), lambda share: expit(0.5 * (share - 0.5))),  # not clipped before the sigmoid
        (Calibration("scale", pair=True, scale=4.0), lambda share: expit(4 * (share - 0.5))),
        (
            Calibration("isotonic", pair=True, knots=(((0.2, 0.1), (0.8, 0.9)),)),
            lambda share: np.interp(share, [0.2, 0.8], [0.1, 0.9]),
        ),
    ],
    ids=lambda value: value.calibrator if isinstance(value, Calibration) else "",
)
def test_an_annotator_of_pairs_gives_the_calibrated_share(
    plan: pl.DataFrame, calibration: Calibration, formula: Callable[[float], float]
) -> None:
    shares = [-0.7, 0.0, 0.25, 0.5, 0.8, 1.0, 1.6, 40.0, -40.0]
    annotations = annotated(plan, list(shares), [None] * 9)
    shuffled = annotations.sample(fraction=1.0, shuffle=True, seed=1)
    found = by_id(soft_labels(plan, shuffled, CLASSES, calibration))
    assert len(found) == 9
    for row, share in zip(plan.rows(named=True), shares, strict=True):
        expected = [0.0] * CLASSES
        expected[row["class_a"]] = formula(share)
        expected[row["class_b"]] = 1 - expected[row["class_a"]]
        assert found[row["mix_id"]] == pytest.approx(expected, abs=1e-6)
        assert sum(found[row["mix_id"]]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("calibration", "logits"),
    [
        (Calibration("none"), lambda row: row),
        (Calibration("temperature", temperature=0.1), lambda row: row / 0.1),
        (Calibration("temperature", temperature=2.5), lambda row: row / 2.5),
        (
            Calibration("vector", weights=(0.5, 1.0, 2.0), biases=(0.3, 0.0, -1.0)),
            lambda row: row * [0.5, 1, 2] + [0.3, 0, -1],
        ),
    ],
    ids=lambda value: value.calibrator if isinstance(value, Calibration) else "",
)
@pytest.mark.parametrize("pair", [False, True])
def test_an_annotator_of_classes_gives_the_calibrated_posterior(
    plan: pl.DataFrame, calibration: Calibration, logits: Callable[[np.ndarray], np.ndarray], pair: bool
) -> None:
    draw = np.random.default_rng(0)
    posterior = np.log(draw.dirichlet(np.ones(CLASSES), 9)).astype(np.float32)
    posterior[3] = [0.0, -INF, -INF]  # certain; its pair is 0 and 1
    annotations = annotated(plan, [0.5] * 9, posterior.tolist()).reverse()
    labels = soft_labels(plan, annotations, CLASSES, replace(calibration, pair=pair))
    found = by_id(labels)
    assert labels.schema["soft_label"] == pl.Array(pl.Float32, CLASSES)
    for row, scores in zip(plan.rows(named=True), posterior.astype(float), strict=True):
        powers = np.exp(logits(scores))
        if pair:
            powers[[k for k in range(CLASSES) if k not in (row["class_a"], row["class_b"])]] = 0
        if powers.sum() > 0:
            assert found[row["mix_id"]] == pytest.approx((powers / powers.sum()).tolist(), abs=1e-6)
        assert sum(found[row["mix_id"]]) == pytest.approx(1, abs=1e-6)


def test_only_annotated_rows_of_the_plan_get_a_label(plan: pl.DataFrame) -> None:
    annotations = annotated(plan, [0.5] * 4, [None] * 4)
    few = plan.slice(2)
    assert set(by_id(soft_labels(few, annotations, CLASSES, Calibration("none", pair=True)))) == set(plan["mix_id"][2:4])


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None])
def test_a_share_that_is_no_number_is_refused(plan: pl.DataFrame, bad: float | None) -> None:
    with pytest.raises(InputError, match="lam_raw is not finite"):
        soft_labels(plan, annotated(plan, [0.5, bad], [None, None]), CLASSES, Calibration("none", pair=True))


@pytest.mark.parametrize("row", [[0.0, NAN, 0.0], [-INF, -INF, -INF], [0.0, INF, 0.0]], ids=["nan", "nothing", "infinite"])
@pytest.mark.parametrize("calibrator", POSTERIOR)
def test_a_posterior_that_is_no_distribution_is_refused(
    plan: pl.DataFrame, posterior: Sample, calibrator: str, row: list[float]
) -> None:
    annotations = annotated(plan, [0.5, 0.5], [[0.0, -1.0, -2.0], row])
    with pytest.raises(InputError, match="log_posterior is no distribution"):
        soft_labels(plan, annotations, CLASSES, fit_calibration(calibrator, posterior[0], None, posterior[1]))


def test_a_posterior_without_mass_on_the_pair_cannot_be_restricted_to_it(plan: pl.DataFrame) -> None:
    first = plan.row(0, named=True)
    outside = [-INF if k in (first["class_a"], first["class_b"]) else 0.0 for k in range(CLASSES)]
    annotations = annotated(plan, [0.5], [outside])
    assert max(by_id(soft_labels(plan, annotations, CLASSES, Calibration("none")))[first["mix_id"]]) == 1
    with pytest.raises(InputError, match="no distribution"):
        soft_labels(plan, annotations, CLASSES, Calibration("none", pair=True))


def test_some_posteriors_are_not_enough(plan: pl.DataFrame) -> None:
    annotations = annotated(plan, [0.5] * 3, [[0.0, -1.0, -2.0], None, None])
    with pytest.raises(InputError, match="log_posterior is null in 2 of 3 rows; expected all or none"):
        soft_labels(plan, annotations, CLASSES, Calibration("none"))


def test_a_calibration_for_other_annotations_is_refused(plan: pl.DataFrame) -> None:
    pairs, classes = annotated(plan, [0.5], [None]), annotated(plan, [0.5], [[0.0, -1.0, -2.0]])
    with pytest.raises(InputError, match="log_posterior is null, which calibrator temperature needs"):
        soft_labels(plan, pairs, CLASSES, Calibration("temperature", temperature=1.0))
    with pytest.raises(InputError, match="scale of a head that knows only the pair does not fit 3 classes"):
        soft_labels(plan, classes, CLASSES, Calibration("scale", pair=True, scale=4.0))
    with pytest.raises(InputError, match="vector of 2 classes does not fit 3 classes"):
        soft_labels(plan, classes, CLASSES, Calibration("vector", weights=(1.0, 1.0), biases=(0.0, 0.0)))


# --- what is fitted


def test_the_temperature_is_that_of_least_nll(posterior: Sample) -> None:
    scores, labels = posterior
    calibration = fit_calibration("temperature", scores, None, labels)
    best = minimize_scalar(lambda t: cross_entropy(scores.double() / t, labels).item(), bounds=(0.1, 20), method="bounded")
    assert calibration.temperature == pytest.approx(best.x, rel=1e-3)
    assert calibration.nll_after == pytest.approx(best.fun, abs=1e-8)
    assert calibration.nll_before == pytest.approx(cross_entropy(scores.double(), labels).item())
    assert calibration.images == 600
    assert not calibration.note


def test_the_vector_is_that_of_least_penalised_nll_and_undoes_what_was_done(posterior: Sample) -> None:
    scores, labels = posterior
    calibration = fit_calibration("vector", scores, None, labels)
    logs, temperature = log_softmax(scores.double().numpy(), axis=1), fit_temperature(scores, labels)

    def loss(parameters: np.ndarray) -> float:
        weights, biases = parameters.reshape(2, CLASSES)
        nll = -log_softmax(logs * weights + biases, axis=1)[np.arange(600), labels.numpy()].sum()
        return nll + 0.5 * ((weights * temperature - 1) ** 2 + biases**2).sum()

    best = minimize(loss, np.repeat([1 / temperature, 0.0], CLASSES), method="BFGS", options={"gtol": 1e-5})
    assert np.array([calibration.weights, calibration.biases]) == pytest.approx(best.x.reshape(2, CLASSES), abs=1e-3)
    assert calibration.biases[0] < min(calibration.biases[1:]) - 0.3  # the lean to class 0
    assert calibration.nll_after == pytest.approx(loss(best.x) / 600, abs=0.005)
    assert calibration.nll is not None
    assert calibration.nll < fit_calibration("temperature", scores, None, labels).nll


def test_isotonic_is_scikit_learns_for_each_class_and_never_certain(posterior: Sample) -> None:
    scores, labels = posterior
    calibration = fit_calibration("isotonic", scores, None, labels)
    probs = scores.double().softmax(dim=1).numpy()
    odds = np.log(probs / (1 - probs))
    expected = np.stack(
        [
            IsotonicRegression(y_min=1 / 602, y_max=601 / 602, out_of_bounds="clip").fit_transform(
                odds[:, k], labels.numpy() == k
            )
            for k in range(CLASSES)
        ],
        axis=1,
    )
    found = apply_calibration(scores, calibration).exp()
    assert found.numpy() == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-6)
    extreme = torch.tensor([[0.0, -1e4, -1e5], [-INF, 0.0, -INF], [0.0, 0.0, 0.0]])
    assert (apply_calibration(extreme, calibration).exp() > 1 / 700).all()
    middle = torch.tensor([[0.0, -0.123, 0.456]])
    probs = middle.double().softmax(dim=1)[0].numpy()
    odds = np.log(probs) - np.log(1 - probs)
    one = [np.interp(score, *np.array(knots).T) for score, knots in zip(odds, calibration.knots, strict=True)]
    assert apply_calibration(middle, calibration).exp()[0].tolist() == pytest.approx(np.divide(one, sum(one)).tolist())


def test_isotonic_tells_certainties_apart_where_probabilities_round_to_1() -> None:
    """Log-odds of 50 and 200: both 1 in float64, but the images of the first are wrong half of the time."""
    margins = torch.tensor([50.0, 200.0], dtype=torch.float64).repeat(40)
    scores = torch.stack([margins, torch.zeros(80)], dim=1)
    labels = torch.arange(80) // 2 % 2 * (margins == 50)
    found = apply_calibration(scores, fit_calibration("isotonic", scores, None, labels)).exp()
    assert found[margins == 50, 0].tolist() == pytest.approx([0.5] * 40, abs=0.01)
    assert (found[margins == 200, 0] > 0.95).all()


def test_the_scale_is_that_of_least_nll_of_pairs(shares: Sample) -> None:
    table, labels = shares
    calibration = fit_calibration("scale", None, table, labels)
    own = others(table, labels)
    best = minimize_scalar(lambda s: np.log1p(np.exp(-s * (own - 0.5))).mean(), bounds=(0.01, 100), method="bounded")
    assert calibration.scale == pytest.approx(best.x, rel=1e-4)
    assert calibration.scale == pytest.approx(6, rel=0.15)
    assert calibration.nll_after == pytest.approx(best.fun)
    assert calibration.pair
    assert (own <= 0).any()
    assert calibration.nll_before is None  # the clipped share gives some class nothing, at a cost without bound


def test_a_given_scale_is_kept_and_measured(shares: Sample) -> None:
    table, labels = shares
    calibration = fit_calibration("scale", None, table, labels, scale=4.0)
    assert calibration.scale == 4.0
    assert calibration.nll == pytest.approx(np.log1p(np.exp(-4 * (others(table, labels) - 0.5))).mean())
    assert calibration.nll == pytest.approx(calibration.nll_after)


def test_isotonic_of_shares_is_scikit_learns_and_takes_both_classes_alike(shares: Sample) -> None:
    table, labels = shares
    calibration = fit_calibration("isotonic", None, table, labels)
    own = others(table, labels)
    fitted = IsotonicRegression(y_min=1 / 1202, y_max=1201 / 1202, out_of_bounds="clip").fit(
        np.concatenate([own, 1 - own]), np.repeat([1, 0], len(own))
    )
    grid = np.linspace(-3, 4, 101)
    apply = CALIBRATORS["isotonic"].apply_share
    assert apply is not None
    found = torch.sigmoid(apply(torch.from_numpy(grid), calibration)).numpy()
    assert found == pytest.approx(fitted.predict(grid), abs=1e-6)
    assert found + found[::-1] == pytest.approx(np.ones(101), abs=1e-6)


@pytest.mark.parametrize("calibrator", POSTERIOR)
def test_the_compared_nll_is_of_images_that_the_fit_did_not_see(posterior: Sample, calibrator: str) -> None:
    scores, labels = posterior[0][:200], posterior[1][:200]
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


def test_the_compared_nll_of_pairs_is_of_images_that_the_fit_did_not_see(shares: Sample) -> None:
    table, labels = shares
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


# --- fits that cannot be told from the data


def test_images_that_are_all_right_do_not_tell_the_temperature() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).log_softmax(dim=1).repeat(20, 1)
    labels = torch.tensor([0, 1]).repeat(20)
    for calibrator in ("temperature", "vector"):
        calibration = fit_calibration(calibrator, scores, None, labels)
        assert (calibration.calibrator, calibration.temperature) == ("temperature", 1.0)
        assert "every held-out image is right, which does not tell T: kept at 1" in calibration.note


def test_shares_that_are_all_on_their_side_do_not_tell_the_scale() -> None:
    calibration = fit_calibration("scale", None, torch.tensor([[9.0, 0.6], [0.9, -9.0]]), torch.tensor([0, 1]))
    assert calibration.scale == 4.0
    assert "does not tell s: kept at 4" in calibration.note


def test_values_at_the_end_of_their_range_are_noted() -> None:
    wrong = torch.tensor([[0.0, -1.0]]).repeat(4, 1)
    assert fit_calibration("temperature", wrong, None, torch.ones(4, dtype=torch.int64)).note == "T = 100 is the end of its range"
    shares = torch.tensor([[9.0, 0.2], [0.3, 9.0]])
    assert fit_calibration("scale", None, shares, torch.tensor([0, 1])).note == "s = 0.01 is the end of its range"


@pytest.mark.parametrize(("count", "words"), [(9, "class 2 has 9"), (0, "class 2 has 0")])
@pytest.mark.parametrize("calibrator", ["vector", "isotonic"])
def test_too_few_images_of_a_class_fall_back(posterior: Sample, shares: Sample, calibrator: str, count: int, words: str) -> None:
    for scores, labels, instead in ((*posterior, "temperature"), (*shares, "scale")):
        rows = torch.cat([(labels < 2).nonzero()[:, 0], (labels == 2).nonzero()[:count, 0]])
        arguments = (scores[rows], None) if instead == "temperature" else (None, scores[rows])
        if instead == "scale" and calibrator == "vector":
            continue
        calibration = fit_calibration(calibrator, *arguments, labels[rows])
        assert calibration.note == f"{calibrator} needs 10 held-out images of each class, {words}: {instead} instead"
        assert calibration == replace(fit_calibration(instead, *arguments, labels[rows]), note=calibration.note)


def test_ten_images_of_each_class_are_enough(posterior: Sample) -> None:
    scores, labels = posterior
    rows = torch.cat([(labels == k).nonzero()[:10, 0] for k in range(CLASSES)])
    for calibrator in ("vector", "isotonic"):
        assert fit_calibration(calibrator, scores[rows], None, labels[rows]).calibrator == calibrator


# --- refusals


@pytest.mark.parametrize("calibrator", [name for name in CALIBRATORS if name != "none"])
def test_a_head_that_says_nothing_of_a_real_image_has_nothing_to_fit(calibrator: str) -> None:
    labels = torch.tensor([0, 1])
    assert fit_calibration("none", None, None, labels) == Calibration("none", pair=True)
    with pytest.raises(InputError, match=f"calibrator {calibrator} has nothing to be fitted on"):
        fit_calibration(calibrator, None, None, labels)


def test_calibrators_are_named_with_the_heads_they_are_for(posterior: Sample, shares: Sample) -> None:
    with pytest.raises(InputError, match="calibrator sharpen is unknown: take one of none, scale, temperature, vector, isotonic"):
        fit_calibration("sharpen", posterior[0], None, posterior[1])
    with pytest.raises(
        InputError, match="scale is not for a head that knows all classes: take one of none, temperature, vector, iso"
    ):
        fit_calibration("scale", posterior[0], None, posterior[1])
    with pytest.raises(InputError, match="vector is not for a head that knows only the pair: take one of none, scale, isotonic"):
        fit_calibration("vector", None, *shares)


@pytest.mark.parametrize(("calibrator", "scale"), [("isotonic", 4.0), ("scale", 0.0), ("scale", NAN), ("scale", INF)])
def test_a_scale_that_makes_no_sense_is_refused(shares: Sample, calibrator: str, scale: float) -> None:
    with pytest.raises(InputError, match="scale must be > 0 and goes with calibrator scale alone"):
        fit_calibration(calibrator, None, *shares, scale=scale)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_annotations_of_real_images_must_be_finite_and_more_than_one(posterior: Sample, bad: float) -> None:
    scores, labels = posterior[0].clone(), posterior[1]
    with pytest.raises(InputError, match="1 held-out images; expected at least 2"):
        fit_calibration("temperature", scores[:1], None, labels[:1])
    scores[5, 1] = bad
    with pytest.raises(InputError, match="not finite"):
        fit_calibration("temperature", scores, None, labels)


# --- shares, files, words, choice


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


@pytest.mark.parametrize("calibrator", list(CALIBRATORS))
def test_a_calibration_comes_back_from_its_file(tmp_path: Path, posterior: Sample, shares: Sample, calibrator: str) -> None:
    if calibrator in POSTERIOR:
        calibration = fit_calibration(calibrator, posterior[0], None, posterior[1], pair=True)
    else:
        calibration = fit_calibration(calibrator, None, *shares)
    storage.write_json(tmp_path / "calibration.json", asdict(calibration))
    assert storage.read_record(tmp_path / "calibration.json", Calibration) == calibration


def test_labels_are_described() -> None:
    fitted = Calibration("temperature", images=30, temperature=2.0)
    assert describe(fitted) == "of all classes, at temperature 2, fitted on 30 real images"
    assert describe(Calibration("scale", pair=True, scale=4.0)) == "of the two classes alone, with scale s = 4"
    assert describe(Calibration("none", pair=True)) == "of the two classes alone, as annotated"


def test_the_choice_is_that_of_least_cross_fitted_nll() -> None:
    def measured(nll: float) -> Calibration:
        return Calibration("temperature", images=500, nll_before=0.0, nll_after=9 - nll, nll=nll, temperature=1.0)

    candidates = {"lda": measured(0.9), "qda-pixels": measured(0.61), "teacher": measured(0.73), "same": measured(0.61)}
    assert choose(candidates) == ("qda-pixels", "qda-pixels: NLL 0.61 on 500 validation images, next same 0.61")
    del candidates["same"]
    assert choose(candidates)[1] == "qda-pixels: NLL 0.61 on 500 validation images, next teacher 0.73"
    assert choose({"lda": candidates["lda"]}) == ("lda", "lda: NLL 0.9 on 500 validation images")


def test_annotators_of_pairs_are_no_candidates(posterior: Sample, shares: Sample) -> None:
    lda = fit_calibration("none", posterior[0], None, posterior[1])
    for bad in (fit_calibration("scale", None, *shares), replace(lda, pair=True), Calibration("none", pair=True)):
        with pytest.raises(InputError, match="x gives no probability outside the pair, so its NLL over all classes is infinite"):
            choose({"lda": lda, "x": bad})
    with pytest.raises(InputError, match="candidates is empty"):
        choose({})
