"""Annotators: what a frozen model says of a mixed image, in place of the ratio that went in."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import polars as pl
import torch

from csm import tables
from csm.errors import InputError
from csm.reannotation.calibrators import Calibration, fit_calibration, soft_labels
from csm.reannotation.projection import fit_projection, load_projection
from csm.reannotation.teacher import fit_teacher, load_teacher


class Annotator(Protocol):
    """A fitted annotator."""

    def __call__(
        self, images: torch.Tensor, class_a: torch.Tensor, class_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Share of class a among the pair, unclipped (N,), and the log-posterior (N, K) before T, or None.

        ``images`` uint8 (N, C, H, W), ``class_a`` and ``class_b`` int64 (N,).
        """
        ...

    def log_posterior(self, images: torch.Tensor) -> torch.Tensor | None:
        """Log-posterior (N, K) of any images, before T, or None for an annotator that knows only the pair."""
        ...


class AnnotatorKind(NamedTuple):
    """How an annotator is made from real images and classifiers trained on them, and how it is loaded again.

    ``fit(directory, members, images, labels, n_classes)`` and ``load(directory, members)``; ``members`` are folders of classifiers.
    """

    fit: Callable[[Path, Sequence[Path], torch.Tensor, torch.Tensor, int], Annotator]
    load: Callable[[Path, Sequence[Path]], Annotator]


ANNOTATORS: dict[str, AnnotatorKind] = {
    "projection": AnnotatorKind(fit_projection, load_projection),
    "teacher": AnnotatorKind(fit_teacher, load_teacher),
}


def annotate(
    plan: pl.DataFrame, mixed: pl.DataFrame, annotator: Annotator, shape: tuple[int, int, int], n_classes: int
) -> pl.DataFrame:
    """Annotate mixed images.

    Args:
        plan: rows of the `plan` table, among them those of every mixed image.
        mixed: rows of the `mixed` table.
        annotator: fitted.
        shape: (H, W, C).
        n_classes: K.

    Returns:
        The `annotations` table, one row for each row of ``mixed``, in the same order.

    Raises:
        InputError: a mixed image is not in the plan.
    """
    rows = mixed.join(plan.select("mix_id", "class_a", "class_b"), on="mix_id", how="left", maintain_order="left")
    if rows["class_a"].null_count():
        raise InputError("annotate: a mixed image is not in the plan: its part file belongs to another plan")
    class_a, class_b = (torch.tensor(rows[name].to_list(), dtype=torch.int64) for name in ("class_a", "class_b"))
    share, posterior = annotator(tables.to_images(rows["image"], shape), class_a, class_b)
    schema = tables.annotations(n_classes)
    column = [None] * len(rows) if posterior is None else posterior.float().numpy()
    frame = pl.DataFrame(
        {
            "mix_id": rows["mix_id"],
            "lam_raw": share.float().numpy(),
            "log_posterior": pl.Series(column, dtype=schema["log_posterior"]),
        }
    )
    return tables.check(frame, schema, "annotations")


__all__ = ["ANNOTATORS", "Annotator", "AnnotatorKind", "Calibration", "annotate", "fit_calibration", "soft_labels"]
