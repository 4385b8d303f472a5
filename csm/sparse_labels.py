"""Soft labels over many classes in little memory: of each its most probable classes, and one number for all the others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseLabels:
    """What ``MixedSet.labels`` is for many classes: labels (M, K) of which each row has m numbers of its own.

    Attributes:
        classes: int32 (M, m), different in each row.
        probs: float32 (M, m), their probabilities.
        rest: float32 (M,), the probability of each of the K - m others; 0 where there are none.
        n_classes: K.
    """

    classes: Tensor
    probs: Tensor
    rest: Tensor
    n_classes: int

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, rows: Tensor) -> "SparseLabels":
        return replace(self, classes=self.classes[rows], probs=self.probs[rows], rest=self.rest[rows])

    @classmethod
    def concat(cls, parts: Sequence["SparseLabels"]) -> "SparseLabels":
        """One after the other; all of as many numbers."""
        classes, probs, rest = (torch.cat([getattr(part, name) for part in parts]) for name in ("classes", "probs", "rest"))
        return cls(classes, probs, rest, parts[0].n_classes)

    @property
    def device(self) -> torch.device:
        return self.rest.device

    @property
    def nbytes(self) -> int:
        """Memory that they take, in bytes."""
        return int(self.classes.nbytes + self.probs.nbytes + self.rest.nbytes)

    def to(self, device: torch.device) -> "SparseLabels":
        return replace(self, classes=self.classes.to(device), probs=self.probs.to(device), rest=self.rest.to(device))

    def dense(self) -> Tensor:
        """Float32 (M, K)."""
        return self.rest[:, None].repeat(1, self.n_classes).scatter_(1, self.classes.long(), self.probs)

    def soften(self, temperature: float) -> "SparseLabels":
        """As ``csm.schedules.soften`` of the dense rows: classes of equal probability stay equal, so these are exactly its rows."""
        each = torch.cat([self.probs, self.rest[:, None]], dim=1).double().log() / temperature  # (M, m + 1)
        copies = torch.ones(each.shape[1], dtype=torch.float64, device=each.device)
        copies[-1] = self.n_classes - self.classes.shape[1]
        probs = (each - (each + copies.log()).logsumexp(dim=1, keepdim=True)).exp().float()
        return replace(self, probs=probs[:, :-1], rest=probs[:, -1])

    def entropies(self) -> Tensor:
        """Entropy of each label in nats, float32 (M,)."""
        others = self.n_classes - self.classes.shape[1]
        entropies: Tensor = torch.special.entr(self.probs).sum(dim=1) + others * torch.special.entr(self.rest)
        return entropies


def rows_of(labels: Tensor | SparseLabels, rows: Tensor) -> Tensor:
    """``rows`` of soft labels as they are trained on, float32 (N, K), where ``labels`` lie."""
    chosen = labels[rows.to(labels.device)]
    return chosen.dense() if isinstance(chosen, SparseLabels) else chosen
