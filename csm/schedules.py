"""Mixing schedules: which mixed images accompany a batch of real ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from csm import tables
from csm.errors import InputError
from csm.sparse_labels import SparseLabels


@dataclass(frozen=True)
class MixedSet:
    """Images of one or several kinds with their soft labels, ordered so that a set is a row.

    Attributes:
        images: uint8 (M, C, H, W).
        labels: soft labels float32 (M, K), or what stands for them.
        rows: int64 (S, R): index into ``images`` of set s at its r-th ratio.
        class_a, class_b: int64 (S,), the pair of each set; real images are sets of one, of the same class twice.
        ratios: float32 (R,), rising shares of class_a, with or without the ends 0 (class_b) and 1 (class_a); NaN where not all sets have
            the same, as beside images of one class each.
        kind: int64 (S,), which of several kinds each set is of; None: all are of one.
    """

    images: torch.Tensor
    labels: torch.Tensor | SparseLabels
    rows: torch.Tensor
    class_a: torch.Tensor
    class_b: torch.Tensor
    ratios: torch.Tensor
    kind: torch.Tensor | None = None

    @classmethod
    def join(
        cls, plan: pl.DataFrame, mixed: pl.DataFrame, labels: pl.DataFrame, shape: tuple[int, int, int], n_classes: int = 0
    ) -> "MixedSet":
        """Join on ``mix_id``; nothing is read from a row's position.

        Args:
            plan: rows of the `plan` table, of one kind.
            mixed: the `mixed` table.
            labels: of ``soft_labels``, or of ``sparse_labels``.
            shape: (H, W, C).
            n_classes: K, of sparse labels.

        Raises:
            InputError: a planned image or its label is missing, or stands twice.
        """
        if plan["kind"].n_unique() > 1:
            raise ValueError(f"plan: expected rows of one kind, got {plan['kind'].unique().to_list()}")
        table = plan.join(mixed, on="mix_id", how="inner").join(labels, on="mix_id", how="inner")
        missing = len(plan) - table["mix_id"].n_unique()
        if missing:
            raise InputError(f"{missing} of {len(plan)} planned images are not mixed and annotated: run csm mix and csm annotate")
        if len(table) > len(plan):
            raise InputError(
                "some mixed images or annotations stand twice: remove their part files, run csm mix and csm annotate"
            )
        table = table.sort("group", "class_a", "class_b", "step")
        sets = table.group_by("group", "class_a", "class_b", maintain_order=True).len()
        steps = int(sets["len"].max())  # type: ignore[arg-type]
        return cls(
            images=tables.to_images(table["image"], shape),
            labels=_labels(table, n_classes),
            rows=torch.arange(len(table)).view(len(sets), steps),
            class_a=torch.from_numpy(sets["class_a"].to_numpy().astype(np.int64)),
            class_b=torch.from_numpy(sets["class_b"].to_numpy().astype(np.int64)),
            ratios=torch.from_numpy(table["lam"].head(steps).to_numpy().copy()),
        )

    @classmethod
    def concat(cls, parts: Sequence["MixedSet"]) -> "MixedSet":
        """The sets of ``parts``, each of a kind of its own, one after the other. Where they have different ratios these are NaN.

        Raises:
            InputError: their sets have different numbers of images, as those of real images and of mixtures.
        """
        if len(parts) == 1:
            return parts[0]
        if len({len(part.ratios) for part in parts}) > 1:
            raise InputError("mixed.images: sets of different numbers of images cannot be drawn from together")
        alike = all(torch.equal(part.ratios, parts[0].ratios) for part in parts)
        sizes = torch.tensor([len(part.images) for part in parts])
        before = (sizes.cumsum(dim=0) - sizes).tolist()
        labels = [part.labels for part in parts]
        sparse = [each for each in labels if isinstance(each, SparseLabels)]
        alike_sparse = len(sparse) == len(labels) and len({each.classes.shape[1] for each in sparse}) == 1
        return cls(
            images=torch.cat([part.images for part in parts]),
            labels=SparseLabels.concat(sparse)
            if alike_sparse
            else torch.cat([each.dense() if isinstance(each, SparseLabels) else each for each in labels]),
            rows=torch.cat([part.rows + offset for part, offset in zip(parts, before, strict=True)]),
            class_a=torch.cat([part.class_a for part in parts]),
            class_b=torch.cat([part.class_b for part in parts]),
            ratios=parts[0].ratios if alike else torch.full_like(parts[0].ratios, math.nan),
            kind=torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part.rows) for part in parts])),
        )

    def first(self, sets: int | None) -> "MixedSet":
        """The first ``sets`` sets of each kind and pair, as a plan of no more would give them; None: all.

        Raises:
            InputError: a pair has fewer.
        """
        if sets is None:
            return self
        kind = torch.zeros_like(self.class_a) if self.kind is None else self.kind
        pairs = torch.stack([kind, self.class_a, self.class_b], dim=1)  # (S, 3)
        _, pair, sizes = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        if sizes.min() < sets:
            raise InputError(
                f"mixed.sets: a pair has only {int(sizes.min())} sets of mixed images, not {sets}: ask for no more, or plan more "
                "(plan.sets_per_pair)"
            )
        order = pair.argsort(stable=True)  # sets, pair by pair
        place = torch.empty_like(order)  # of a set among those of its pair
        place[order] = torch.arange(len(order)) - (sizes.cumsum(dim=0) - sizes)[pair[order]]
        kept = place < sets
        rows = self.rows[kept]
        images = rows.flatten()
        return MixedSet(
            images=self.images[images],
            labels=self.labels[images],
            rows=torch.arange(rows.numel()).view_as(rows),
            class_a=self.class_a[kept],
            class_b=self.class_b[kept],
            ratios=self.ratios,
            kind=kind[kept],
        )


class Schedule:
    """Draws mixed images for real ones; holds the index of sets by class, which is built once.

    ``draw(labels, generator)`` takes the labels int64 (B,) of a real batch and gives indices int64 (B * per_real,) into
    ``MixedSet.images``.
    """

    def __init__(self, rule: str, per_real: int, mixed: MixedSet, n_classes: int) -> None:
        if rule not in SCHEDULES:
            raise InputError(f"schedule: unknown {rule!r}; one of {', '.join(SCHEDULES)}")
        if rule in OF_PAIRS and mixed.ratios.isnan().any():
            raise InputError(f"schedule {rule!r} needs images that have all the same ratios: take 'uniform' or 'ambiguity'")
        self._rule = SCHEDULES[rule]
        self._per_real = per_real
        self._mixed = mixed
        holds = [((mixed.class_a == k) | (mixed.class_b == k)).nonzero().flatten() for k in range(n_classes)]
        self._sizes = torch.tensor([len(sets) for sets in holds])
        is_inner = (mixed.ratios > 0) & (mixed.ratios < 1)
        self._inner = is_inner.nonzero().flatten()  # steps that are mixtures of both classes
        self._ends = (~is_inner).nonzero().flatten()
        self._sets = torch.nn.utils.rnn.pad_sequence(holds, batch_first=True)  # (K, most sets of a class)
        if rule == "ambiguity":
            self._ambiguity = _entropies(mixed.labels).double().cumsum(dim=0).cpu()  # (M,)

    def draw(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self._rule(self, labels, generator)

    def pair(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The paper's rule: one set whose pair holds the class; from it the class's own endpoint and interior images.

        Where the ratios have no endpoint, the image with most of the class stands in, and where they have no interior, the endpoint.
        """
        if (self._sizes[labels] == 0).any():
            raise InputError("schedule 'pair' needs a mixed pair for every class: widen plan.pairs or take schedule 'interior'")
        pick = (torch.rand(len(labels), generator=generator) * self._sizes[labels]).long()
        sets = self._sets[labels, pick]  # (B,)
        last = self._mixed.rows.shape[1] - 1
        own = torch.where(self._mixed.class_a[sets] == labels, last, 0)  # the highest share is that of most of class_a
        shape = (self._per_real - 1, len(labels))
        inner = self._inner
        interior = inner[torch.randint(0, len(inner), shape, generator=generator)] if len(inner) else own.expand(shape)
        steps = torch.cat([own[None], interior])  # (per_real, B)
        return self._mixed.rows[sets, steps].flatten()

    def uniform(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Any mixed image, whatever the classes of the real ones."""
        return torch.randint(0, len(self._mixed.images), (len(labels) * self._per_real,), generator=generator)

    def interior(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Any image that is a mixture of both classes: not an endpoint of its set."""
        if len(self._inner) == 0:
            raise InputError("schedule 'interior' needs plan.ratios of at least 3, or a list with one between 0 and 1")
        return self._any_of(self._inner, labels, generator)

    def endpoints(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Any image at an end of its set, where one class alone went in."""
        if len(self._ends) == 0:
            raise InputError("schedule 'endpoints' needs plan.ratios that begin with 0 or end with 1")
        return self._any_of(self._ends, labels, generator)

    def _any_of(self, steps: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Any image of ``steps``."""
        rows = self._mixed.rows[:, steps].flatten()
        return rows[torch.randint(0, len(rows), (len(labels) * self._per_real,), generator=generator)]

    def ambiguity(self, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Any mixed image, with probability proportional to the entropy of its soft label: what could be either comes more often."""
        total = self._ambiguity[-1]
        if total == 0:
            raise InputError("schedule 'ambiguity' needs soft labels; those of this annotator are all certain: take 'uniform'")
        place = torch.rand(len(labels) * self._per_real, generator=generator, dtype=torch.float64) * total
        return torch.searchsorted(self._ambiguity, place, right=True).clamp(max=len(self._ambiguity) - 1)


def soften(labels: torch.Tensor | SparseLabels, temperature: float) -> torch.Tensor | SparseLabels:
    """Soft labels q (N, K) as q^(1/T), normalised: T > 1 softens, T < 1 sharpens, 1 changes nothing; a class of 0 stays 0."""
    if temperature == 1:
        return labels
    if isinstance(labels, SparseLabels):
        return labels.soften(temperature)
    # Of log q, so that a small T does not lose every class of a row to underflow.
    return (labels.double().log() / temperature).softmax(dim=1).to(labels.dtype)


def _labels(table: pl.DataFrame, n_classes: int) -> torch.Tensor | SparseLabels:
    """The soft labels of joined rows."""
    if "soft_label" in table.columns:
        return torch.from_numpy(table["soft_label"].to_numpy().astype(np.float32))
    classes = torch.from_numpy(table["classes"].to_numpy().astype(np.int32))
    probs, rest = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("probs", "rest"))
    return SparseLabels(classes, probs, rest, n_classes)


def _entropies(labels: torch.Tensor | SparseLabels) -> torch.Tensor:
    """Of each label, in nats, (M,)."""
    return labels.entropies() if isinstance(labels, SparseLabels) else torch.special.entr(labels).sum(dim=1)


SCHEDULES: dict[str, Callable[[Schedule, torch.Tensor, torch.Generator], torch.Tensor]] = {
    "pair": Schedule.pair,
    "uniform": Schedule.uniform,
    "interior": Schedule.interior,
    "endpoints": Schedule.endpoints,
    "ambiguity": Schedule.ambiguity,
}
OF_PAIRS = ("pair", "interior", "endpoints")  # schedules that ask for the ratio of a mixture
WITHOUT_PAIRS = ("unmixed", "real")  # kinds of images that are no mixtures
