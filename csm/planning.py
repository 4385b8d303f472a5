"""The plan: one row for every image that will be mixed."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from csm import storage, tables
from csm.errors import InputError
from csm.noise import mix_seeds


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PlanConfig:
    """Which mixed images to make.

    Attributes:
        pairs: "all" unordered pairs of different classes, or a list of pairs of class indices.
        ratios: number of ratios of a set, evenly spaced from 0 to 1 with both ends (paper: 8).
        sets_per_pair: number of initial noises for each pair.
        shard_rows: rows of a shard, the unit of work; whole sets.
        seed: another seed gives other noises and other ids.
    """

    pairs: Literal["all"] | tuple[tuple[int, int], ...] = "all"
    ratios: int = Field(default=8, ge=2, le=255)
    sets_per_pair: int = Field(default=4, ge=1)
    shard_rows: int = Field(default=2048, ge=1)
    seed: int = Field(default=0, ge=0)


def make_plan(n_classes: int, dataset: str, generator: str, config: PlanConfig) -> pl.DataFrame:
    """Return the `plan` table, a pure function of its arguments.

    Rows are ordered by group, then pair, then step, so that an unfinished run already covers all pairs. A ``mix_id`` is a pure function
    of (dataset, generator, config.seed, class_a, class_b, group, step): more sets later keep the ids, seeds and pictures of the first.

    Args:
        n_classes: K >= 2.
        dataset, generator: digests of the data set and of the generator.
        config: what to plan.

    Raises:
        InputError: a pair names an unknown class, twice the same class, or stands twice.
    """
    class_a, class_b = check_pairs(config.pairs, n_classes)
    pairs, steps, sets = len(class_a), config.ratios, config.sets_per_pair
    group = np.repeat(np.arange(sets, dtype=np.uint32), pairs * steps)
    first = np.tile(np.repeat(class_a, steps), sets)
    second = np.tile(np.repeat(class_b, steps), sets)
    step = np.tile(np.arange(steps, dtype=np.uint8), sets * pairs)
    key = storage.digest(dataset, generator, config.seed)
    sets_per_shard = max(1, config.shard_rows // steps)
    shard = np.arange(len(step)) // (sets_per_shard * steps)
    frame = pl.DataFrame(
        {
            "shard": shard.astype(np.uint32),
            "group": group,
            "seed": mix_seeds(int(key, 16), first, second, group),
            "class_a": first,
            "class_b": second,
            "step": step,
            "lam": np.linspace(0.0, 1.0, steps, dtype=np.float32)[step],
        }
    )
    mix_id = pl.format("{}-{}-{}-{}-{}", pl.lit(key), "class_a", "class_b", "group", "step").alias("mix_id")
    return tables.check(frame.select(mix_id, *frame.columns), tables.PLAN, "plan")


def plan_digest(plan: pl.DataFrame) -> str:
    """Identifies a plan by every value of every row."""
    return storage.bytes_digest(*(plan.hash_rows(seed=0).to_numpy().tobytes(), *(name.encode() for name in plan.columns)))


def check_pairs(pairs: str | Sequence[tuple[int, int]], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return class_a < class_b of every pair, as uint16 arrays; ``InputError`` as for ``make_plan``."""
    if isinstance(pairs, str):
        first, second = np.triu_indices(n_classes, k=1)
        return first.astype(np.uint16), second.astype(np.uint16)
    ordered = [(min(pair), max(pair)) for pair in pairs]
    for pair in ordered:
        if pair[0] == pair[1] or pair[0] < 0 or pair[1] >= n_classes:
            raise InputError(f"plan.pairs: {list(pair)} is not a pair of two different classes of 0..{n_classes - 1}")
    if len(set(ordered)) != len(ordered) or not ordered:
        raise InputError(f"plan.pairs: expected different pairs, at least one, got {[list(pair) for pair in ordered]}")
    table = np.array(ordered, dtype=np.uint16)
    return table[:, 0], table[:, 1]
