"""Annotators: an encoder's features and a head, or an ensemble of such; what they say of mixed images as a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from csm import tables
from csm.encoders import Encoder, encode
from csm.errors import InputError
from csm.reannotation.ensemble import load_ensemble
from csm.reannotation.registry import HEADS
from csm.reannotation.truncation import truncate


@dataclass(frozen=True)
class AnnotatorSpec:
    """Where a fitted annotator lies.

    Attributes:
        name: of the annotator.
        kind: of its head, a key of ``HEADS``; or "ensemble".
        directory: what was fitted, on storage that every node sees.
        encoder: name of its encoder; None for heads that read no features, and for ensembles.
        members: of an ensemble, fitted and calibrated.
    """

    name: str
    kind: str
    directory: Path
    encoder: str | None = None
    members: tuple["AnnotatorSpec", ...] = ()

    @property
    def encoders(self) -> frozenset[str]:
        """Names of the encoders whose features it needs."""
        own = frozenset() if self.encoder is None else frozenset({self.encoder})
        return own.union(*(member.encoders for member in self.members))


class Annotator:
    """A fitted annotator, ready on a device."""

    def __init__(self, spec: AnnotatorSpec, device: str = "cpu") -> None:
        self.spec = spec
        self.pair = spec.kind in HEADS and HEADS[spec.kind].pair
        if spec.kind == "ensemble":
            self.head: Any = load_ensemble(spec.directory)
            self.members = [Annotator(member, device) for member in spec.members]
        else:
            self.head = HEADS[spec.kind].load(spec.directory)
        self.head.to(torch.device(device))

    @torch.no_grad()
    def log_posterior(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Log-posterior (N, K) before calibration, or None for an annotator that knows only the pair; ``features`` by encoder."""
        if self.pair:
            return None
        if self.spec.kind == "ensemble":
            pooled: torch.Tensor = self.head([member.log_posterior(features) for member in self.members])
            return pooled
        posterior: torch.Tensor = self.head(features[self.spec.encoder or ""])
        return posterior

    @torch.no_grad()
    def annotate(
        self, features: Mapping[str, torch.Tensor], class_a: torch.Tensor, class_b: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Share of class a among the pair, unclipped (N,), and the log-posterior (N, K) before calibration, or None.

        ``class_a`` and ``class_b`` int64 (N,), ``lam`` float32 (N,), on the annotator's device like ``features``.
        """
        posterior = self.log_posterior(features)
        if posterior is None:
            own = features[self.spec.encoder] if self.spec.encoder else None
            return self.head.share(own, class_a, class_b, lam), None
        row = torch.arange(len(posterior), device=posterior.device)
        return torch.sigmoid(posterior[row, class_a] - posterior[row, class_b]), posterior


def annotate(
    plan: pl.DataFrame,
    mixed: pl.DataFrame,
    annotators: Mapping[str, Annotator],
    encoders: Mapping[str, Encoder],
    shape: tuple[int, int, int],
    n_classes: int,
    device: str = "cpu",
    top: int | None = None,
) -> dict[str, pl.DataFrame]:
    """Annotate mixed images; each goes through each encoder once, whatever the number of annotators.

    Args:
        plan: rows of the `plan` table, among them those of every mixed image.
        mixed: rows of the `mixed` table; without the column ``image`` if no annotator has an encoder.
        annotators: by name, on ``device``.
        encoders: those of the annotators by name, on ``device``.
        shape: (H, W, C).
        n_classes: K.
        device: for torch.
        top: keep only so many classes of each image, fewer than K; an ensemble pools whole posteriors all the same.

    Returns:
        For each annotator the `annotations` table, one row for each row of ``mixed``, in the same order.

    Raises:
        InputError: a mixed image is not in the plan, or a feature or what an annotator says is not finite.
    """
    rows = mixed.select("mix_id").join(
        plan.select("mix_id", "class_a", "class_b", "lam"), on="mix_id", how="left", maintain_order="left"
    )
    if rows["class_a"].null_count():
        raise InputError("annotate: a mixed image is not in the plan: its part file belongs to another plan")
    class_a, class_b = (torch.from_numpy(rows[name].to_numpy().astype(np.int64)).to(device) for name in ("class_a", "class_b"))
    lam = torch.from_numpy(rows["lam"].to_numpy().copy()).to(device)
    needed = frozenset[str]().union(*(annotator.spec.encoders for annotator in annotators.values()))
    images = tables.to_images(mixed["image"], shape) if needed else torch.empty(0)
    features = {}
    for name in sorted(needed):
        try:
            features[name] = encode(encoders[name], images, device)
        except InputError as error:
            raise InputError(f"encoder {name}: {error}") from None
    schema = tables.annotations(n_classes, top)
    frames = {}
    for name, annotator in annotators.items():
        share, posterior = annotator.annotate(features, class_a, class_b, lam)
        if posterior is not None and posterior.shape[1] != n_classes:
            raise InputError(f"annotator {name} knows {posterior.shape[1]} classes, the data has {n_classes}: fit it again")
        if not share.isfinite().all() or (posterior is not None and posterior.isnan().any()):
            raise InputError(
                f"annotator {name}: what it says of an image is no number: check what it was fitted from and fit it again"
            )
        said = _columns(posterior, len(rows), schema, top)
        frame = pl.DataFrame({"mix_id": rows["mix_id"], "lam_raw": share.float().cpu().numpy(), **said})
        frames[name] = tables.check(frame, schema, "annotations")
    return frames


def _columns(posterior: torch.Tensor | None, count: int, schema: tables.Schema, top: int | None) -> dict[str, pl.Series]:
    """Those of the posterior (N, K), all null if there is none."""
    if posterior is None:
        names = [name for name in schema if name not in ("mix_id", "lam_raw")]
        return {name: pl.Series([None] * count, dtype=schema[name]) for name in names}
    if top is None:
        return {"log_posterior": pl.Series(posterior.float().cpu().numpy(), dtype=schema["log_posterior"])}
    said = truncate(posterior, top)._asdict()
    return {name: pl.Series(value.cpu().numpy()).cast(schema[name]) for name, value in said.items()}
