"""Ratios at which a pair is mixed."""

import numpy as np
import pytest
from scipy.stats import beta

from csm.errors import InputError
from csm.planning import PlanConfig, ratio_grid
from tests.csm.plans import SET, plan


@pytest.mark.parametrize("ratios", [2, 3, 8, 255])
def test_ratios_are_evenly_spaced_with_both_ends(ratios: int) -> None:
    frame = plan(2, ratios=ratios, sets_per_pair=1)
    assert frame["lam"].to_numpy() == pytest.approx([step / (ratios - 1) for step in range(ratios)], abs=1e-7)
    assert (frame["lam"][0], frame["lam"][-1]) == (0.0, 1.0)  # exactly
    assert frame["step"].to_list() == list(range(ratios))


@pytest.mark.parametrize("ratios", [2, 3, 8, 255])
def test_the_cosine_grid_is_dense_at_both_ends(ratios: int) -> None:
    grid = ratio_grid(PlanConfig(ratios=ratios, grid="cosine"))
    # Chebyshev's extrema, moved to 0..1: an independent way to the same numbers
    extrema = (np.polynomial.chebyshev.chebpts2(ratios) + 1) / 2
    assert grid == pytest.approx(extrema, abs=1e-7)
    assert (grid[0], grid[-1]) == (0.0, 1.0)  # exactly


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("ratios", [2, 3, 8])
def test_the_beta_grid_is_quantiles_with_both_ends(ratios: int, alpha: float) -> None:
    grid = ratio_grid(PlanConfig(ratios=ratios, grid="beta", alpha=alpha))
    assert grid == pytest.approx(beta(alpha, alpha).ppf(np.linspace(0, 1, ratios)), rel=1e-5, abs=1e-7)
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert grid + grid[::-1] == pytest.approx(np.ones(ratios), abs=1e-6)  # neither class is favoured


def test_beta_of_1_is_uniform_and_beta_of_a_half_is_cosine() -> None:
    for alpha, name in ((1.0, "uniform"), (0.5, "cosine")):
        assert ratio_grid(PlanConfig(grid="beta", alpha=alpha)) == pytest.approx(ratio_grid(PlanConfig(grid=name)), abs=1e-6)


def test_a_list_of_ratios_is_taken_as_it_stands() -> None:
    frame = plan(3, ratios=(0.1, 0.5, 0.75), sets_per_pair=2)
    assert frame["lam"].to_list() == [np.float32(0.1), 0.5, 0.75] * 6
    assert frame["step"].to_list() == [0, 1, 2] * 6
    assert plan(2, ratios=(0.25,), sets_per_pair=1)["lam"].to_list() == [0.25]


@pytest.mark.parametrize("ratios", [(), (0.5, 0.5), (0.3, 0.2), (0.5, 0.5 + 1e-9), tuple(np.linspace(0, 1, 256).tolist())])
def test_a_list_must_rise_in_float32_and_fit_its_step(ratios: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"plan.ratios: expected 1 to 255 different ratios that rise"):
        ratio_grid(PlanConfig(ratios=ratios))


@pytest.mark.parametrize("alpha", [0.01, 1e-6, 1e-300])
def test_quantiles_that_fall_together_are_refused(alpha: float) -> None:
    with pytest.raises(InputError, match=r"plan.alpha: 9 quantiles of Beta\("):
        ratio_grid(PlanConfig(ratios=9, grid="beta", alpha=alpha))


def test_a_list_of_the_uniform_ratios_is_the_uniform_grid() -> None:
    assert plan(ratios=(0.0, 0.25, 0.5, 0.75, 1.0)).equals(plan(ratios=5))


GRIDS = [
    {},
    {"grid": "cosine"},
    {"grid": "beta"},
    {"grid": "beta", "alpha": 3.0},
    {"ratios": (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)},
]


def test_another_grid_gives_other_ids_from_the_same_noises() -> None:
    plans = [plan(**settings) for settings in GRIDS]
    ids = [set(frame["mix_id"]) for frame in plans]
    assert len(set.union(*ids)) == sum(len(part) for part in ids)
    assert all(frame["seed"].equals(plans[0]["seed"]) for frame in plans)


@pytest.mark.parametrize("settings", GRIDS)
def test_more_sets_or_other_pairs_keep_the_rows_of_any_grid(settings: dict[str, object]) -> None:
    columns = ["mix_id", "seed", *SET, "step", "lam"]
    whole = plan(6, sets_per_pair=4, **settings).select(columns)
    for other in ({"sets_per_pair": 2}, {"pairs": ((0, 3), (1, 2)), "sets_per_pair": 3, "shard_rows": 10}):
        some = plan(6, **settings, **other).select(columns)
        assert len(some.join(whole, on=columns)) == len(some)
