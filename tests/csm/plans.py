"""Small plans, and one of several pieces."""

import polars as pl

from csm.planning import PlanConfig, make_plan

SET = ["class_a", "class_b", "group"]


def plan(n_classes: int = 4, dataset: str = "data", generator: str = "net", **settings: object) -> pl.DataFrame:
    return make_plan(n_classes, dataset, generator, PlanConfig(**{"sets_per_pair": 4, **settings}))


def large(**settings: object) -> tuple[int, PlanConfig]:
    """A plan of several pieces: 40 classes, 780 pairs."""
    return 40, PlanConfig(**{"pairs": "all", "ratios": 9, "sets_per_pair": 30, "shard_rows": 1000, **settings})
