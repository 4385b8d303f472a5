import math

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import cross_entropy

from csm import tables
from csm.errors import InputError
from csm.planning import PlanConfig, make_plan
from csm.reannotation.calibrators import Calibration, fit_calibration, soft_labels

CLASSES = 3
NAN, INF = float("nan"), float("inf")


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


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_an_annotator_of_pairs_gives_the_sigmoid(plan: pl.DataFrame, scale: float) -> None:
    shares = [-0.7, 0.0, 0.25, 0.5, 0.8, 1.0, 1.6, 40.0, -40.0]  # not clipped before the sigmoid
    annotations = annotated(plan, list(shares), [None] * 9)
    shuffled = annotations.sample(fraction=1.0, shuffle=True, seed=1)
    found = by_id(soft_labels(plan, shuffled, CLASSES, Calibration(scale)))
    assert len(found) == 9
    for row, share in zip(plan.rows(named=True), shares, strict=True):
        expected = [0.0] * CLASSES
        expected[row["class_a"]] = 1 / (1 + math.exp(-scale * (share - 0.5)))
        expected[row["class_b"]] = 1 - expected[row["class_a"]]
        assert found[row["mix_id"]] == pytest.approx(expected, abs=1e-6)
        assert sum(found[row["mix_id"]]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5])
def test_an_annotator_of_classes_gives_the_softmax(plan: pl.DataFrame, temperature: float) -> None:
    draw = np.random.default_rng(0)
    posterior = np.log(draw.dirichlet(np.ones(CLASSES), 9)).astype(np.float32)
    posterior[3] = [0.0, -INF, -INF]  # certain
    annotations = annotated(plan, [0.5] * 9, posterior.tolist()).reverse()
    labels = soft_labels(plan, annotations, CLASSES, Calibration(4.0, temperature))
    found = by_id(labels)
    assert labels.schema["soft_label"] == pl.Array(pl.Float32, CLASSES)
    for name, row in zip(plan["mix_id"].to_list(), posterior.astype(float), strict=True):
        powers = np.exp(row / temperature)
        assert found[name] == pytest.approx((powers / powers.sum()).tolist(), abs=1e-6)
        assert sum(found[name]) == pytest.approx(1, abs=1e-6)


def test_only_annotated_rows_of_the_plan_get_a_label(plan: pl.DataFrame) -> None:
    annotations = annotated(plan, [0.5] * 4, [None] * 4)
    few = plan.slice(2)
    assert set(by_id(soft_labels(few, annotations, CLASSES, Calibration(1.0)))) == set(plan["mix_id"][2:4])


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None])
def test_a_share_that_is_no_number_is_refused(plan: pl.DataFrame, bad: float | None) -> None:
    with pytest.raises(InputError, match="lam_raw is not finite"):
        soft_labels(plan, annotated(plan, [0.5, bad], [None, None]), CLASSES, Calibration(4.0))


@pytest.mark.parametrize("row", [[0.0, NAN, 0.0], [-INF, -INF, -INF], [0.0, INF, 0.0]], ids=["nan", "nothing", "infinite"])
def test_a_posterior_that_is_no_distribution_is_refused(plan: pl.DataFrame, row: list[float]) -> None:
    annotations = annotated(plan, [0.5, 0.5], [[0.0, -1.0, -2.0], row])
    with pytest.raises(InputError, match="log_posterior"):
        soft_labels(plan, annotations, CLASSES, Calibration(4.0, 1.5))


def test_some_posteriors_are_not_enough(plan: pl.DataFrame) -> None:
    annotations = annotated(plan, [0.5] * 3, [[0.0, -1.0, -2.0], None, None])
    with pytest.raises(InputError, match="log_posterior is null in 2 of 3 rows; expected all or none"):
        soft_labels(plan, annotations, CLASSES, Calibration(4.0, 1.5))


def test_the_temperature_is_that_of_least_nll() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, CLASSES, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(truth.softmax(dim=1), 1, generator=draw).squeeze(1)
    overconfident = (3 * truth).log_softmax(dim=1).float()
    calibration = fit_calibration(overconfident, labels, 4.0)
    assert calibration.temperature == pytest.approx(3.0, rel=0.1)
    assert calibration.images == 4000
    assert calibration.scale == 4.0
    assert calibration.nll_before == pytest.approx(cross_entropy(overconfident, labels).item(), rel=1e-5)
    assert calibration.nll_after is not None
    assert calibration.nll_before is not None
    assert calibration.nll_after < calibration.nll_before - 0.1
    assert calibration.nll_after == pytest.approx(
        cross_entropy(overconfident.double() / calibration.temperature, labels).item(), rel=1e-6
    )
    for other in np.linspace(0.5, 8, 40):
        assert cross_entropy(overconfident.double() / other, labels).item() >= calibration.nll_after - 1e-9


def test_an_annotator_of_pairs_has_nothing_to_fit() -> None:
    assert fit_calibration(None, torch.tensor([0, 1]), 2.3) == Calibration(scale=2.3)
