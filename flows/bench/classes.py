"""bench classes: what annotation costs as the number of classes grows, and what is lost when only the most probable ones are stored."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from rich import box
from rich.table import Table

from csm import tables, truth
from csm.encoders import FeatureTable, Sources, encode_table
from csm.encoders.pixels import Pixels, load_pixels
from csm.errors import InputError
from csm.metrics import evaluate
from csm.pairs import Pairs, all_pairs, confusion_distances, nearest_pairs
from csm.plan_rules import resolve_plan
from csm.planning import PlanConfig, make_plan
from csm.reannotation import HEADS, Annotator, AnnotatorSpec, Calibration, FitInputs, annotate, fit_calibration
from csm.reannotation.labels import soft_labels, sparse_labels
from csm.schedules import MixedSet
from csm.sparse_labels import rows_of
from flows.bench.gaussian_classes import SHAPE, SIDE, Law, gaussian_classes
from flows.progress import say

TRAIN, VAL = 20, 10  # images of each class
TEST = 4000
SHARD_ROWS = 2048
REPEATS = 3
EPOCHS, BATCH, RATE = 5, 256, 0.02  # of the classifier


def classes(
    numbers: Sequence[int] = (10, 100, 1000), tops: Sequence[int] = (8, 32), images: int = 16_384
) -> list[dict[str, Any]]:
    """Annotate mixed images of K Gaussian classes by ``lda`` on pixels, store whole posteriors or their ``top`` classes, and learn both.

    The plan is the one that ``csm.plan_rules`` makes of the data, with the pairs that the annotator confuses; ``images`` of it, drawn at
    random, are mixed: the pixels' noise about a point between the two class means. All figures of a K are of one run.

    Args:
        numbers: of classes, K each.
        tops: numbers of classes to store; those of K and more are left out.
        images: mixed ones, at most.

    Returns:
        A row for each K and what is stored (``top`` null: all classes):

        * classes, top, pairs, sets (of the plan), images.
        * annotate_us: time for each image, from pixels to a part file, the best of 3; annotate_ratio: in units of that with all classes.
        * row_bytes: of a part file for each image; label_bytes: of its soft label in training. rest: mean share of what is not stored.
        * tv_lost: mean total variation between the calibrated labels and those from whole posteriors; tv_worst: the most of any image.
        * tv, nll: of the labels to the true posterior; nll is the mean of -sum_k t_k log p_k.
        * classifier_accuracy, classifier_nll, classifier_tv: a linear classifier that learned the labels, on real test images.
        * seconds: of this K, all in all.

    Raises:
        InputError: a K is below 2.
    """
    if min(numbers) < 2:
        raise InputError(f"--classes {min(numbers)}: expected 2 at least")
    return [row for number in numbers for row in _measure(number, [top for top in tops if top < number], images)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    headings = ("classes", "top", "pairs", "us/image", "ratio", "B/row", "B/label", "rest %", "lost TV %", "TV %", "NLL")
    for heading in (*headings, "| acc. %", "NLL", "TV %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            f"{row['classes']:,}", str(row["top"] or "all"), f"{row['pairs']:,}", f"{row['annotate_us']:.1f}",
            f"{row['annotate_ratio']:.2f}", f"{row['row_bytes']:,.0f}", f"{row['label_bytes']:,.0f}", f"{100 * row['rest']:.3f}",
            f"{100 * row['tv_lost']:.3f}", f"{100 * row['tv']:.2f}", f"{row['nll']:.4f}", f"{100 * row['classifier_accuracy']:.2f}",
            f"{row['classifier_nll']:.4f}", f"{100 * row['classifier_tv']:.2f}",
        )  # fmt: skip
    return shown


class _Data(NamedTuple):
    """What is annotated, and by whom."""

    law: Law
    annotator: Annotator
    calibration: Calibration
    plan: pl.DataFrame
    mixed: pl.DataFrame
    pairs: int
    sets: int
    test: tuple[torch.Tensor, torch.Tensor]


def _measure(number: int, tops: Sequence[int], images: int) -> list[dict[str, Any]]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        data = _make(number, images, Path(folder))
        say(
            f"{number:,} classes: {len(data.mixed):,} mixed images; the rules: {data.pairs:,} pairs x {data.sets} sets x 8 ratios"
        )
        found = _annotated(data, number, (None, *tops), Path(folder))
        rows = _rows(data, number, found)
    return [{**row, "seconds": round(time.monotonic() - started, 1)} for row in rows]


def _make(number: int, images: int, folder: Path) -> _Data:
    """A law of ``number`` classes, an annotator that was fitted and calibrated on images of it, and mixed images as the rules plan them."""
    draw = torch.Generator().manual_seed(number)
    law = gaussian_classes(number, draw)
    labels = torch.cat([torch.arange(number).repeat(TRAIN + VAL), torch.randint(0, number, (TEST,), generator=draw)])
    pixels = law.draw(law.means[labels], draw)
    real = (TRAIN + VAL) * number
    frame = pl.DataFrame(
        {
            "image_id": np.arange(real, dtype=np.uint32),
            "split": pl.Series(["train"] * (TRAIN * number) + ["val"] * (VAL * number), dtype=tables.SPLIT),
            "label": labels[:real].numpy().astype(np.uint16),
            "image": tables.from_images(pixels[:real]),
        }
    )
    features = encode_table(Pixels(), frame, SHAPE)
    tables.write(features, folder / "features" / "part-00000.parquet", tables.features(SIDE * SIDE))
    inputs = FitInputs(FeatureTable(folder / "features"), number, tuple(map(str, range(number))))
    HEADS["lda"].fit(folder / "lda", inputs)
    annotator = Annotator(AnnotatorSpec("lda", "lda", folder / "lda", "pixels"))
    held_out, names = inputs.features.matrix("val")
    said = annotator.log_posterior({"pixels": held_out})
    assert said is not None
    config = resolve_plan(PlanConfig(), number, TRAIN * number)
    pairs = all_pairs(number) if config.pairs == "all" else _confused(said, names, int(config.pairs_per_class))
    plan = _some(make_plan(number, "bench", "bench", config, pairs), images)
    share = torch.from_numpy(plan["lam"].to_numpy().astype(np.float64))[:, None]
    a, b = (law.means[torch.from_numpy(plan[name].to_numpy().astype(np.int64))] for name in ("class_a", "class_b"))
    mixed = plan.select("mix_id").with_columns(image=tables.from_images(law.draw(share * a + (1 - share) * b, draw)))
    calibration = fit_calibration("temperature", said, None, names)
    return _Data(law, annotator, calibration, plan, mixed, len(pairs), config.sets, (pixels[real:], labels[real:]))


def _confused(said: torch.Tensor, labels: torch.Tensor, per_class: int) -> Pairs:
    return nearest_pairs(confusion_distances(said, labels, said.shape[1]), per_class)


def _some(plan: pl.DataFrame, images: int) -> pl.DataFrame:
    """Whole sets of ``plan`` at random, of at most ``images`` rows, in its order."""
    steps = int(plan["step"].max()) + 1  # type: ignore[arg-type]
    sets = len(plan) // steps
    chosen = np.sort(np.random.default_rng(0).permutation(sets)[: max(1, images // steps)])
    return plan[(steps * chosen[:, None] + np.arange(steps)).ravel()]


def _annotated(
    data: _Data, number: int, tops: Sequence[int | None], folder: Path
) -> dict[int | None, tuple[pl.DataFrame, float, float]]:
    """Stored classes -> annotations, microseconds and bytes of an image; one after the other, and all of them again."""
    encoders, best, size = {"pixels": load_pixels(Sources(folder))}, dict.fromkeys(tops, float("inf")), dict.fromkeys(tops, 0.0)
    frames: dict[int | None, pl.DataFrame] = {}

    def work(top: int | None) -> list[pl.DataFrame]:
        found = []
        for number_of, first in enumerate(range(0, len(data.mixed), SHARD_ROWS)):
            shard = data.plan[first : first + SHARD_ROWS], data.mixed[first : first + SHARD_ROWS]
            frame = annotate(*shard, {"lda": data.annotator}, encoders, SHAPE, number, top=top)["lda"]
            tables.write(frame, folder / f"{top}" / f"part-{number_of:05d}.parquet", tables.annotations(number, top))
            found.append(frame)
        return found

    for _ in range(REPEATS):
        for top in tops:
            seconds, parts = _timed(work, top)
            best[top] = min(best[top], seconds)
            frames[top] = pl.concat(parts)
    for top in tops:
        size[top] = sum(file.stat().st_size for file in (folder / f"{top}").iterdir()) / len(data.mixed)
    return {top: (frames[top], 1e6 * best[top] / len(data.mixed), size[top]) for top in tops}


def _rows(data: _Data, number: int, found: dict[int | None, tuple[pl.DataFrame, float, float]]) -> list[dict[str, Any]]:
    mixed_truth = data.law.log_posterior(tables.to_images(data.mixed["image"], SHAPE)).exp()
    test_truth = data.law.log_posterior(data.test[0]).exp()
    whole = _labels(data, found[None][0], number)
    rows = []
    for top, (annotations, us, size) in found.items():
        labels = _labels(data, annotations, number)
        lost = (labels - whole).abs().sum(dim=1) / 2
        read = soft_labels if top is None else sparse_labels
        learned = MixedSet.join(data.plan, data.mixed, read(data.plan, annotations, number, data.calibration), SHAPE, number)
        logits = _learn(learned, data.law, number)(data.test[0])
        scores = evaluate(logits, data.test[1], metrics=["accuracy", "nll"])
        row = {
            "classes": number,
            "top": top,
            "pairs": data.pairs,
            "sets": data.sets,
            "images": len(data.mixed),
            "annotate_us": us,
            "annotate_ratio": us / found[None][1],
            "row_bytes": size,
            "label_bytes": learned.labels.nbytes / len(learned.images),
            "rest": 0.0 if top is None else float(np.exp(annotations["log_rest"].to_numpy()).mean()),
            "tv_lost": lost.mean().item(),
            "tv_worst": lost.max().item(),
            "tv": truth.tv(labels, mixed_truth),
            "nll": -torch.xlogy(mixed_truth, labels.double().clamp(min=1e-300)).sum(dim=1).mean().item(),
            "classifier_accuracy": scores["accuracy"],
            "classifier_nll": scores["nll"],
            "classifier_tv": truth.tv(logits.double().softmax(dim=1), test_truth),
        }
        rows.append(row)
    return rows


def _labels(data: _Data, annotations: pl.DataFrame, number: int) -> torch.Tensor:
    """Soft labels float32 (N, K) of the mixed images, in their order."""
    labels = soft_labels(data.plan, annotations, number, data.calibration)
    rows = data.mixed.select("mix_id").join(labels, on="mix_id", how="left", maintain_order="left")
    return torch.from_numpy(rows["soft_label"].to_numpy().copy())


def _learn(mixed: MixedSet, law: Law, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear classifier: convex, so that two trainings differ by their labels alone; images uint8 -> logits (N, K)."""
    draw = torch.Generator().manual_seed(0)
    center = law.means.mean(dim=0).float()

    def features(images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1).float() - center) / law.deviation

    layer = torch.nn.Linear(SIDE * SIDE, number)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.Adam(layer.parameters(), lr=RATE)
    steps = EPOCHS * -(-len(mixed.images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(mixed.images), generator=draw).split(BATCH):
            log_probs = layer(features(mixed.images[rows])).log_softmax(dim=1)
            optimiser.zero_grad()
            (-(rows_of(mixed.labels, rows) * log_probs).sum(dim=1).mean()).backward()
            optimiser.step()
            schedule.step()
    return torch.no_grad()(lambda images: layer(features(images)))


def _timed(function: Callable[[int | None], list[pl.DataFrame]], top: int | None) -> tuple[float, list[pl.DataFrame]]:
    started = time.monotonic()
    result = function(top)
    return time.monotonic() - started, result
