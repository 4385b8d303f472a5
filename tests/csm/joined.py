"""Mixed sets in which every image and every soft label tells which row of the plan it belongs to."""

import numpy as np
import polars as pl
import torch

from csm.planning import PlanConfig, make_plan
from csm.schedules import MixedSet

SHAPE = (1, 4, 1)
CLASSES = 4


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_tables(ratios: int = 4, sets: int = 3, pairs: object = "all") -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Plan, mixed and labels in which every image and every soft label tells which row it belongs to."""
    plan = make_plan(CLASSES, "data", "net", PlanConfig(pairs=pairs, ratios=ratios, sets_per_pair=sets))
    identities = list(plan.select("class_a", "class_b", "group", "step").iter_rows())
    images = pl.Series("image", [bytes(identity) for identity in identities], dtype=pl.Binary)
    labels = pl.Series("soft_label", np.array(identities, dtype=np.float32), dtype=pl.Array(pl.Float32, CLASSES))
    return plan, plan.select("mix_id").with_columns(images), plan.select("mix_id").with_columns(labels)


def mixed_set(**settings: object) -> MixedSet:
    return MixedSet.join(*make_tables(**settings), SHAPE)


def identity(mixed: MixedSet, row: int) -> tuple[int, ...]:
    """(class_a, class_b, group, step) that is written in the pixels of ``row``."""
    return tuple(mixed.images[row].flatten().tolist())
