"""The plan: one row for every image that will be mixed."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from scipy.special import betaincinv

from csm import storage, tables
from csm.errors import InputError
from csm.noise import mix_seeds
from csm.pairs import Pairs, all_pairs, listed_pairs
from csm.plan_rules import pair_policy

MEASURED = ("confusion", "prototypes")  # policies whose pairs are chosen by what fitted annotators say
CHUNK_ROWS = 65536  # of a row group, about: what a reader of one shard decodes


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PlanConfig:
    """Which mixed images to make. What is ``auto`` is resolved by ``csm.plan_rules`` once the data are known.

    Attributes:
        pairs: "all" unordered pairs of different classes; those of each class with the ``pairs_per_class`` classes that it is most
            easily taken for, by the posterior of the teacher on the validation split ("confusion") or by the distance between class
            means of the train split in the encoder's feature space ("prototypes"); or a list of pairs, of class indices (whole numbers)
            or class names (texts).
        pairs_per_class: of the policies "confusion" and "prototypes".
        ratios: number of ratios of a set, spaced by ``grid`` from 0 to 1 with both ends (paper: 8); or a list of rising ratios.
        grid: spacing, see ``GRIDS``: "uniform" (the paper's), "cosine" (denser at the ends) or "beta".
        alpha: of the "beta" grid, the quantiles of Beta(alpha, alpha): below 1 denser at the ends, above 1 denser in the middle.
        sets_per_pair: number of initial noises for each pair, see ``sets``.
        shard_rows: rows of a shard, the unit of work; whole sets.
        seed: another seed gives other noises and other ids.
    """

    pairs: Literal["auto", "all", "confusion", "prototypes"] | tuple[tuple[int | str, int | str], ...] = "auto"
    pairs_per_class: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    ratios: Annotated[int, Field(ge=2, le=255)] | tuple[Annotated[float, Field(ge=0, le=1)], ...] = 8
    grid: Literal["uniform", "cosine", "beta"] = "uniform"
    alpha: float = Field(default=2.0, gt=0)
    sets_per_pair: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    shard_rows: int = Field(default=2048, ge=1)
    seed: int = Field(default=0, ge=0)

    @property
    def sets(self) -> int:
        """``sets_per_pair`` of a resolved configuration."""
        if isinstance(self.sets_per_pair, str):
            raise ValueError("sets_per_pair: expected a number, got 'auto', which resolve_plan makes one")
        return self.sets_per_pair


GRIDS: dict[str, Callable[[npt.NDArray[np.float64], float], npt.NDArray[np.float64]]] = {
    "uniform": lambda t, alpha: t,
    "cosine": lambda t, alpha: (1 - np.cos(np.pi * t)) / 2,
    "beta": lambda t, alpha: betaincinv(alpha, alpha, t),
}


def ratio_grid(config: PlanConfig) -> npt.NDArray[np.float32]:
    """Shares of class_a that the images of a set have, float32 (R,), rising; ``step`` of the plan is the index in it.

    A spaced grid is ``GRIDS[config.grid]`` of R numbers evenly spaced from 0 to 1, so its ends are 0 and 1 whatever the spacing. A list
    is taken as it stands, with or without them.

    Raises:
        InputError: the ratios of a list are not 1 to 255 different rising ones, or the list has a spacing too; or those of a spacing
            are so close that they cannot be told apart.
    """
    if isinstance(config.ratios, int):
        spaced = GRIDS[config.grid](np.linspace(0.0, 1.0, config.ratios), config.alpha).astype(np.float32)
        if not (np.diff(spaced) > 0).all():
            raise InputError(
                f"plan.alpha: {config.ratios} quantiles of Beta({config.alpha:g}, {config.alpha:g}) are not different numbers; "
                "bring alpha nearer to 1 or take fewer plan.ratios"
            )
        return spaced
    if config.grid != "uniform":
        raise InputError(
            f"plan.grid: plan.ratios is a list, which leaves nothing to space: expected 'uniform', got {config.grid!r}"
        )
    listed = np.array(config.ratios, dtype=np.float32)
    if not 1 <= len(listed) <= 255 or not (np.diff(listed) > 0).all():
        raise InputError(f"plan.ratios: expected 1 to 255 different ratios that rise, got {list(config.ratios)}")
    return listed


def make_plan(n_classes: int, dataset: str, generator: str, config: PlanConfig, pairs: Pairs | None = None) -> pl.DataFrame:
    """Return the `plan` table, a pure function of its arguments; ``write_plan`` writes one that memory need not hold.

    Rows are ordered by group, then pair, then step, so that an unfinished run already covers all pairs. A ``mix_id`` is a pure function
    of (dataset, generator, config.seed, class_a, class_b, group, step) and of the ratios, if they are not evenly spaced: more sets or
    other pairs later keep the ids, seeds and pictures of the first. The ratios have no part in a seed.

    Args:
        n_classes: K >= 2.
        dataset, generator: digests of the data set and of the generator.
        config: what to plan.
        pairs: in place of those of ``config.pairs``; needed where that is one of ``MEASURED``.

    Raises:
        InputError: a pair names an unknown class, twice the same class, or stands twice; or the ratios cannot be used.
    """
    if pairs is None:
        policy = pair_policy(n_classes) if config.pairs == "auto" else config.pairs
        if policy in MEASURED:
            raise ValueError(f"pairs: expected those that were chosen by {policy}, got None")
        pairs = all_pairs(n_classes) if isinstance(policy, str) else listed_pairs(policy, n_classes)
    return pl.concat(_chunks(pairs, dataset, generator, config))


def write_plan(path: Path, pairs: Pairs, dataset: str, generator: str, config: PlanConfig) -> tuple[int, str]:
    """Write what ``make_plan`` returns to ``path``, in pieces of whole shards, and return its rows and its ``plan_digest``.

    A row group of the file holds whole shards, about ``CHUNK_ROWS`` rows. Time and disk grow with the plan, memory does not.
    """
    rows = len(pairs) * config.sets * len(ratio_grid(config))
    digest = hashlib.blake2b((8 * rows).to_bytes(8, "little"), digest_size=8)  # plan_digest's first part, which is here in pieces
    with tables.in_pieces(path, tables.PLAN) as write:
        for chunk in _chunks(pairs, dataset, generator, config):
            write(chunk)
            digest.update(chunk.hash_rows(seed=0).to_numpy().tobytes())
    for name in tables.PLAN:
        digest.update(len(name).to_bytes(8, "little") + name.encode())
    return rows, digest.hexdigest()


def plan_digest(plan: pl.DataFrame) -> str:
    """Identifies a plan by every value of every row."""
    return storage.bytes_digest(*(plan.hash_rows(seed=0).to_numpy().tobytes(), *(name.encode() for name in plan.columns)))


def _chunks(pairs: Pairs, dataset: str, generator: str, config: PlanConfig) -> Iterator[pl.DataFrame]:
    """The plan's rows in order, whole shards at a time."""
    ratios = ratio_grid(config)
    steps = len(ratios)
    seed_key = storage.digest(dataset, generator, config.seed)
    uniform = np.array_equal(ratios, np.linspace(0.0, 1.0, steps, dtype=np.float32))
    id_key = seed_key if uniform else storage.digest(dataset, generator, config.seed, ratios.tolist())
    sets_per_shard = max(1, config.shard_rows // steps)
    sets_per_chunk = sets_per_shard * max(1, CHUNK_ROWS // (sets_per_shard * steps))
    for start in range(0, len(pairs) * config.sets, sets_per_chunk):
        number = np.arange(start, min(start + sets_per_chunk, len(pairs) * config.sets))
        group, (class_a, class_b) = number // len(pairs), pairs[number % len(pairs)].T
        sets = pl.DataFrame(
            {
                "shard": number // sets_per_shard,
                "group": group,
                "seed": mix_seeds(int(seed_key, 16), class_a, class_b, group),
                "class_a": class_a,
                "class_b": class_b,
            }
        ).with_columns(pl.format("{}-{}-{}-{}-", pl.lit(id_key), "class_a", "class_b", "group").alias("mix_id"))
        rows = sets[np.repeat(np.arange(len(number)), steps)].with_columns(
            pl.Series("step", np.tile(np.arange(steps, dtype=np.uint8), len(number))),
            pl.Series("lam", np.tile(ratios, len(number))),
        )
        rows = rows.with_columns(pl.concat_str("mix_id", pl.col("step").cast(pl.String)))
        yield rows.select(pl.col(name).cast(dtype) for name, dtype in tables.PLAN.items())
