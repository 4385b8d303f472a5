"""The plan: one row for every image that will be mixed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.special import betaincinv

from csm import storage, tables
from csm.errors import InputError
from csm.noise import mix_seeds
from csm.pairs import Pairs, all_pairs, listed_pairs
from csm.parameters import STRICT, check_name
from csm.plan_rules import pair_policy

MEASURED = ("confusion", "prototypes")  # policies whose pairs are chosen by what fitted annotators say
SEMANTIC, REAL = "semantic", "real"  # kinds: those that are planned unless others are asked for, and those that no pair makes
DIGESTS = "csm.digests"  # in the footer of a plan: kind -> digest of its rows
SHARDS_OF_KIND = 10_000_000  # each kind has numbers of its own: its part files stay where they are, whatever else is planned
CHUNK_ROWS = 65536  # of a row group, about: what a reader of one shard decodes


@dataclass(frozen=True, config=STRICT)
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
        sets_per_pair: number of sets for each pair, see ``sets``.
        noise: what the images of a set start from: each from a noise of its own ("image"), and those of kinds "pixel" and "noised" from
            training images of their own; or all from one ("set", the paper's), so that they differ by their ratio alone.
        shard_rows: rows of a shard, the unit of work; whole sets.
        seed: another seed gives other noises and other ids.
        kinds: of images to make, see ``tables.KINDS``: "semantic" mixtures; and for comparison, of the same pairs, sets and ratios,
            "unmixed" (images of one class each, the nearer one, from noises of their own), "pixel" (two training images mixed pixel by
            pixel) and "noised" (a training image of the nearer class, noised and denoised as the mixture), and "real" (every training
            image as it is).
    """

    pairs: Literal["auto", "all", "confusion", "prototypes"] | tuple[tuple[int | str, int | str], ...] = "auto"
    pairs_per_class: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    ratios: Annotated[int, Field(ge=2, le=255)] | tuple[Annotated[float, Field(ge=0, le=1)], ...] = 8
    grid: Literal["uniform", "cosine", "beta"] = "uniform"
    alpha: float = Field(default=2.0, gt=0)
    sets_per_pair: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    noise: Literal["image", "set"] = "image"
    shard_rows: int = Field(default=2048, ge=1)
    seed: int = Field(default=0, ge=0)
    kinds: tuple[str, ...] = (SEMANTIC,)

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


def shard_name(shard: int) -> str:
    """What a shard is called: its number among those of its kind, and the kind if that is not "semantic"."""
    kind, number = divmod(shard, SHARDS_OF_KIND)
    return f"shard {number}" + (f" of kind {tables.KINDS[kind]}" if kind else "")


def first_shard(kind: str) -> int:
    """The lowest number of a shard of ``kind``; every plan that has images of it has this one."""
    return tables.KINDS.index(kind) * SHARDS_OF_KIND


def check_kinds(kinds: Sequence[str]) -> None:
    """``InputError`` unless ``kinds`` are different ones of ``tables.KINDS``, at least one."""
    for kind in kinds:
        check_name("plan.kinds", kind, tables.KINDS)
    if not kinds or len(set(kinds)) < len(kinds):
        raise InputError(f"plan.kinds: expected different kinds of images, at least one, got {list(kinds)}")


def make_plan(
    n_classes: int,
    dataset: str,
    generator: str,
    config: PlanConfig,
    pairs: Pairs | None = None,
    labels: npt.NDArray[np.integer] | None = None,
) -> pl.DataFrame:
    """Return the `plan` table, a pure function of its arguments; ``write_plan`` writes one that memory need not hold.

    Rows are ordered by kind, as in ``tables.KINDS``, then group, pair and step, so that an unfinished run already covers all pairs. A
    ``mix_id`` is a pure function of (dataset, generator, config.seed, class_a, class_b, group, step), of the ratios, if they are not evenly
    spaced, of the kind, if that is not "semantic", and of ``config.noise``, if that is not "set": more sets, other pairs or other kinds
    later keep the ids, seeds and pictures of the first. The ratios have no part in a seed.

    Args:
        n_classes: K >= 2.
        dataset, generator: digests of the data set and of the generator.
        config: what to plan.
        pairs: in place of those of ``config.pairs``; needed where that is one of ``MEASURED``.
        labels: (N,) of the train split in order of image_id; needed for the kind "real".

    Raises:
        InputError: a pair names an unknown class, twice the same class, or stands twice; or the ratios or kinds cannot be used.
    """
    if pairs is None:
        policy = pair_policy(n_classes) if config.pairs == "auto" else config.pairs
        if policy in MEASURED:
            raise ValueError(f"pairs: expected those that were chosen by {policy}, got None")
        pairs = all_pairs(n_classes) if isinstance(policy, str) else listed_pairs(policy, n_classes)
    return pl.concat(_chunks(pairs, dataset, generator, config, labels))


def write_plan(
    path: Path,
    pairs: Pairs,
    dataset: str,
    generator: str,
    config: PlanConfig,
    labels: npt.NDArray[np.integer] | None = None,
) -> tuple[int, str]:
    """Write what ``make_plan`` returns to ``path``, in pieces of whole shards, and return its rows and its ``plan_digest``.

    A row group of the file holds whole shards, about ``CHUNK_ROWS`` rows. Time and disk grow with the plan, memory does not.
    """
    rows = planned_images(config, len(pairs), 0 if labels is None else len(labels))
    # The first part of each digest, which is here in pieces.
    hashes = {kind: hashlib.blake2b((8 * count).to_bytes(8, "little"), digest_size=8) for kind, count in rows.items()}
    footer: dict[str, str] = {}
    with tables.in_pieces(path, tables.PLAN, footer) as write:
        for chunk in _chunks(pairs, dataset, generator, config, labels):
            write(chunk)
            hashes[chunk["kind"][0]].update(chunk.select(_DIGESTED).hash_rows(seed=0).to_numpy().tobytes())
        for name in _DIGESTED:
            for part in hashes.values():
                part.update(len(name).to_bytes(8, "little") + name.encode())
        digests = {kind: part.hexdigest() for kind, part in hashes.items()}
        footer[DIGESTS] = json.dumps(digests)
    return sum(rows.values()), _joined(digests)


def planned_images(config: PlanConfig, pairs: int, real: int) -> dict[str, int]:
    """Kind -> rows of a plan of so many ``pairs``, of a data set with ``real`` training images."""
    of_sets = pairs * config.sets * len(ratio_grid(config))
    return {kind: real if kind == REAL else of_sets for kind in tables.KINDS if kind in config.kinds}


def plan_digest(plan: pl.DataFrame) -> str:
    """Identifies a plan by every value of every row. One of semantic mixtures alone has the digest that it had before there were kinds."""
    parts = {part["kind"][0]: part.select(_DIGESTED) for part in plan.partition_by("kind")}
    names = [name.encode() for name in _DIGESTED]
    return _joined(
        {kind: storage.bytes_digest(part.hash_rows(seed=0).to_numpy().tobytes(), *names) for kind, part in parts.items()}
    )


def kind_digests(plan: Path) -> dict[str, str]:
    """Kind -> what identifies its rows of the plan that ``write_plan`` wrote; {} for one of a version that knew no kinds."""
    digests: dict[str, str] = json.loads((tables.metadata(plan) or {}).get(DIGESTS, "{}"))
    return digests


def _joined(digests: Mapping[str, str]) -> str:
    """The digest of a plan, by those of its kinds."""
    return digests[SEMANTIC] if list(digests) == [SEMANTIC] else storage.digest(dict(digests))


_DIGESTED = [name for name in tables.PLAN if name != "kind"]


def _chunks(
    pairs: Pairs, dataset: str, generator: str, config: PlanConfig, labels: npt.NDArray[np.integer] | None
) -> Iterator[pl.DataFrame]:
    """The plan's rows in order, whole shards at a time."""
    check_kinds(config.kinds)
    for number, kind in enumerate(tables.KINDS):
        if kind not in config.kinds:
            continue
        key = (dataset, generator, config.seed) if kind == SEMANTIC else (dataset, generator, config.seed, kind)
        if kind == REAL:
            if labels is None:
                raise ValueError("labels: kind real needs those of the train split, got None")
            chunks = _real_chunks(labels, storage.digest(*key), config.shard_rows)
        else:
            chunks = _set_chunks(pairs, key, config, alone=kind == "unmixed")
        for chunk in chunks:
            if chunk["shard"][-1] >= SHARDS_OF_KIND:
                raise InputError(f"plan.shard_rows: the plan has more than {SHARDS_OF_KIND:,} shards: give it more rows a shard")
            rows = chunk.with_columns(pl.col("shard") + number * SHARDS_OF_KIND, kind=pl.lit(kind))
            yield rows.select(pl.col(name).cast(dtype) for name, dtype in tables.PLAN.items())


def _set_chunks(pairs: Pairs, key: tuple[str | int, ...], config: PlanConfig, alone: bool) -> Iterator[pl.DataFrame]:
    """Rows of sets, whole shards at a time, which count from 0. ``alone``: of one class each, and every row has a noise of its own."""
    own_noise = alone or config.noise == "image"
    ratios = ratio_grid(config)
    steps = len(ratios)
    seed_key = storage.digest(*key)
    uniform = np.array_equal(ratios, np.linspace(0.0, 1.0, steps, dtype=np.float32))
    later = [*([] if uniform else [ratios.tolist()]), *(["image"] if own_noise and not alone else [])]
    id_key = storage.digest(*key, *later)
    sets_per_shard = max(1, config.shard_rows // steps)
    sets_per_chunk = sets_per_shard * max(1, CHUNK_ROWS // (sets_per_shard * steps))
    for start in range(0, len(pairs) * config.sets, sets_per_chunk):
        number = np.arange(start, min(start + sets_per_chunk, len(pairs) * config.sets))
        group, pair = np.divmod(number, len(pairs))
        class_a, class_b = pairs[pair].T
        step, of_set = np.tile(np.arange(steps), len(number)), np.repeat(np.arange(len(number)), steps)
        sets = pl.DataFrame(
            {
                "shard": number // sets_per_shard,
                "group": group,
                "seed": mix_seeds(int(seed_key, 16), class_a, class_b, group),
                "class_a": class_a,
                "class_b": class_b,
            }
        ).with_columns(pl.format("{}-{}-{}-{}-", pl.lit(id_key), "class_a", "class_b", "group").alias("mix_id"))
        rows = sets[of_set].with_columns(step=pl.Series(step.astype(np.uint8)), lam=pl.Series(np.tile(ratios, len(number))))
        if own_noise:
            seeds = mix_seeds(int(seed_key, 16), *(values[of_set] for values in (class_a, class_b, group)), step)
            rows = rows.with_columns(seed=pl.Series(seeds))
        if alone:
            nearer = nearer_a(rows["lam"].to_numpy(), (group + pair)[of_set])
            rows = rows.with_columns(lam=pl.Series(nearer.astype(np.float32)))
        yield rows.with_columns(pl.concat_str("mix_id", pl.col("step").cast(pl.String)))


def _real_chunks(labels: npt.NDArray[np.integer], key: str, shard_rows: int) -> Iterator[pl.DataFrame]:
    """A row for each image of the train split, whole shards at a time, which count from 0."""
    rows_per_chunk = shard_rows * max(1, CHUNK_ROWS // shard_rows)
    for start in range(0, len(labels), rows_per_chunk):
        number = np.arange(start, min(start + rows_per_chunk, len(labels)))
        rows = pl.DataFrame(
            {
                "shard": number // shard_rows,
                "group": number,
                "seed": mix_seeds(int(key, 16), number),
                "class_a": labels[number],
                "class_b": labels[number],
            }
        ).with_columns(step=pl.lit(0), lam=pl.lit(1.0))
        yield rows.with_columns(pl.format("{}-{}-{}-{}-0", pl.lit(key), "class_a", "class_b", "group").alias("mix_id"))


def nearer_a(lam: npt.NDArray[np.float32], draw: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether class_a is the nearer end of ratios ``lam`` (N,); in the very middle it is where ``draw`` (N,) is odd."""
    return np.where(lam == 0.5, draw % 2 == 1, lam > 0.5)
