from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from scipy.special import expit

from csm import tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.reannotation.calibration import fit_calibration
from csm.reannotation.calibrators import CALIBRATORS, Calibration
from csm.reannotation.labels import soft_labels, sparse_labels
from csm.reannotation.truncation import complete, truncate
from csm.schedules import MixedSet
from csm.sparse_labels import SparseLabels

CLASSES = 3
NAN, INF = float("nan"), float("inf")
POSTERIOR = [name for name, kind in CALIBRATORS.items() if kind.fit_posterior]


@pytest.fixture
def plan() -> pl.DataFrame:
    return make_plan(CLASSES, "data", "net", PlanConfig(ratios=3, sets_per_pair=1))


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
    plan: pl.DataFrame, held_out_posterior: tuple[torch.Tensor, torch.Tensor], calibrator: str, row: list[float]
) -> None:
    annotations = annotated(plan, [0.5, 0.5], [[0.0, -1.0, -2.0], row])
    with pytest.raises(InputError, match="log_posterior is no distribution"):
        soft_labels(plan, annotations, CLASSES, fit_calibration(calibrator, held_out_posterior[0], None, held_out_posterior[1]))


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


# Truncated posteriors --------------------------------------------------------------------------------------------------

MANY, TOP = 7, 3
CALIBRATIONS = [
    Calibration("none"),
    Calibration("temperature", temperature=0.4),
    Calibration("temperature", temperature=3.0),
    Calibration("vector", weights=tuple(np.linspace(0.5, 2, MANY)), biases=tuple(np.linspace(-1, 1, MANY))),
    Calibration("isotonic", knots=tuple(((-4.0, 0.01), (0.5 * k, 0.5), (4.0, 0.9)) for k in range(MANY))),
]


def truncated(rows: int = 42) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    """A plan of ``MANY`` classes, its annotations with ``TOP`` of them, in another order, and the completed posteriors in that order."""
    plan = make_plan(MANY, "data", "net", PlanConfig(ratios=3, sets_per_pair=1)).head(rows)
    said = truncate(torch.from_numpy(np.log(np.random.default_rng(0).dirichlet(np.full(MANY, 0.3), rows))).clamp(min=-60), TOP)
    frame = pl.DataFrame(
        {
            "mix_id": plan["mix_id"].reverse(),
            "lam_raw": pl.Series([0.5] * rows, dtype=pl.Float32),
            "classes": pl.Series(said.classes.numpy().astype(np.uint16), dtype=pl.Array(pl.UInt16, TOP)),
            "log_posterior": pl.Series(said.log_posterior.numpy(), dtype=pl.Array(pl.Float32, TOP)),
            "log_rest": said.log_rest.numpy(),
        }
    )
    return plan, tables.check(frame, tables.annotations(MANY, TOP)), complete(said, MANY).numpy()


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=lambda value: value.calibrator)
def test_a_truncated_posterior_is_read_as_the_completed_one(calibration: Calibration, pair: bool) -> None:
    plan, annotations, whole = truncated()
    calibration = replace(calibration, pair=pair)
    dense = annotations.select("mix_id", "lam_raw", pl.Series("log_posterior", whole, dtype=pl.Array(pl.Float32, MANY)))
    found, expected = (soft_labels(plan, frame, MANY, calibration) for frame in (annotations, dense))
    assert found.equals(expected)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=lambda value: value.calibrator)
def test_sparse_labels_are_the_soft_labels(calibration: Calibration, pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csm.reannotation.labels.CHUNK", 6 * MANY)  # several parts, the last of them smaller
    plan, annotations, _ = truncated()
    calibration = replace(calibration, pair=pair)
    sparse = sparse_labels(plan, annotations, MANY, calibration)
    dense = by_id(soft_labels(plan, annotations, MANY, calibration))
    images = plan.select("mix_id").with_columns(image=pl.lit(b"0123"))
    mixed = MixedSet.join(plan, images, sparse, (2, 2, 1), MANY)
    assert isinstance(mixed.labels, SparseLabels)
    assert mixed.labels.classes.shape == (42, 2 if pair else TOP)
    order = plan.sort("group", "class_a", "class_b", "step")["mix_id"]
    for mix_id, label in zip(order, mixed.labels.dense().tolist(), strict=True):
        expected = np.array(dense[mix_id])
        if (
            calibration.calibrator in ("vector", "isotonic") and not pair
        ):  # the classes after the first three share what they have
            kept = np.argsort(-expected, kind="stable")[:TOP]
            tail = np.delete(expected, kept).mean()
            expected = np.array([expected[k] if k in kept else tail for k in range(MANY)])
        assert label == pytest.approx(expected, abs=1e-6)


def test_labels_of_pairs_are_sparse_too() -> None:
    plan, annotations, _ = truncated()
    nothing = {name: pl.lit(None, annotations.schema[name]) for name in ("classes", "log_posterior", "log_rest")}
    shares = tables.check(annotations.with_columns(**nothing, lam_raw=pl.lit(0.7, pl.Float32)), tables.annotations(MANY, TOP))
    sparse = sparse_labels(plan, shares, MANY, Calibration("none", pair=True))
    joined = sparse.join(plan, on="mix_id")
    assert joined["classes"].to_list() == [list(pair) for pair in joined.select("class_a", "class_b").iter_rows()]
    assert joined["probs"].to_numpy() == pytest.approx(np.tile([0.7, 0.3], (42, 1)))
    assert joined["rest"].to_list() == [0] * 42


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_truncated_posterior_that_is_no_distribution_is_refused(bad: float) -> None:
    plan, annotations, _ = truncated()
    with pytest.raises(InputError, match="log_posterior is no distribution"):
        sparse_labels(plan, annotations.with_columns(log_rest=pl.lit(bad, pl.Float32)), MANY, Calibration("none"))
