"""The finished report of a run: what it holds, and how that becomes one self-contained HTML page."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from flows.plain_words import plain_words
from flows.reliability import Reliability, diagram, is_drawable
from flows.report_annotators import AnnotatorResult
from flows.report_run import FinishedModel, Repeat
from flows.report_sweep import Sweep
from flows.result_tables import POSTHOC_COLUMNS, lowest
from flows.scatter import HEIGHT, WIDTH, nice_ticks
from flows.shift_summary import shift_tables
from flows.summary import (
    COLUMNS,
    NONE,
    SIGNIFICANT,
    TEMPERATURE,
    Method,
    baseline_of,
    is_compared,
    select,
    shown,
    summary_table,
)
from flows.verdict import verdict

Picture = NDArray[np.uint8]

# What one page shows at most, so that 200 classes of 64 pixels stay under 2 MB; it says what it leaves out.
MAX_SETS, MAX_CLASSES, MAX_SAMPLES, MAX_SIDE = 12, 20, 8, 96
PIXELATED_BELOW = 64  # smaller pictures are scaled up with hard pixel edges
LOSSLESS_BELOW = 48  # smaller pictures are stored pixel by pixel, larger ones as photographs


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline: seconds it took, whether its result was reused, rows it wrote (None: no table).

    ``device_seconds``: how long its workers were busy, times their devices; None where they were not counted.
    """

    name: str
    seconds: float
    reused: bool
    rows: int | None = None
    device_seconds: float | None = None


@dataclass(frozen=True)
class Dataset:
    """The data: rows per split, image shape (height, width, channels)."""

    name: str
    class_names: Sequence[str]
    split_counts: Mapping[str, int]
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Annotation:
    """What an annotator says of a mixed image.

    Attributes:
        share: confidence in class_a relative to the pair, in [0, 1].
        outside: mass on all other classes, in [0, 1]; None for an annotator that knows only the pair.
        top_class: name of the most probable class; "" if not known.
        raw: ``share`` before calibration; None if not known.
    """

    share: float
    outside: float | None = None
    top_class: str = ""
    raw: float | None = None

    def words(self) -> str:
        """What it says, in words for a box and for screen readers."""
        calibrated = f"calibrated {self.share:.2f}" if self.raw is None else f"raw {self.raw:.2f}, calibrated {self.share:.2f}"
        outside = "" if self.outside is None else f", {100 * self.outside:.0f} % outside the pair"
        return f"{calibrated}{outside}{f', most likely {self.top_class}' if self.top_class else ''}"


@dataclass(frozen=True)
class Cell:
    """A mixed image uint8 (H, W, 1 or 3), the share ``lam`` of class_a that went in, annotations by annotator."""

    lam: float
    image: Picture
    annotations: Mapping[str, Annotation] = field(default_factory=dict)


@dataclass(frozen=True)
class MixedSet:
    """Images of one pair of classes, shown from class_b (ratio 0) to class_a (ratio 1)."""

    class_a: str
    class_b: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Report:
    """All that the page shows (empty parts are left out).

    ``metrics``, ``comparison`` and ``shift_metrics`` are tables of ``csm.tables``; ``cost``: method -> ``device`` seconds of training.
    """

    title: str
    created: datetime
    command: str
    machine: str
    config_yaml: str
    dataset: Dataset
    stages: Sequence[Stage]
    methods: Sequence[Method]
    metrics: pl.DataFrame
    comparison: pl.DataFrame | None = None
    shift_metrics: pl.DataFrame | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    device: str = "core s"
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    annotators: Sequence[AnnotatorResult] = ()
    sweep: Sweep | None = None
    model: FinishedModel | None = None
    repeat: Repeat | None = None
    gallery: Sequence[MixedSet] = ()
    data_samples: Sequence[tuple[str, Sequence[Picture]]] = ()
    generator_samples: Sequence[tuple[str, Sequence[Picture]]] = ()
    split: str = "test"
    n_bins: int = 15


def render(report: Report) -> str:
    """Return the report as one HTML page that loads nothing from elsewhere; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # by name it would not be: the template ends in .j2
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "data_uri": data_uri,
        "duration": duration,
        "number": lambda value: f"{value:,}",
    }
    rows = select(report.metrics, report.methods, split=report.split, n_bins=report.n_bins)
    summary = summary_table(rows, report.methods, report.comparison, split=report.split, n_bins=report.n_bins)
    in_table = summary.filter(pl.col("posthoc").is_in([NONE, TEMPERATURE]))
    sentences = verdict(
        rows,
        report.methods,
        report.comparison,
        split=report.split,
        n_bins=report.n_bins,
        mark=lambda name: f"<b>{escape(name)}</b>",
    )
    counted = report.dataset
    plain = plain_words(
        summary,
        report.methods,
        report.reliability,
        dataset=str(escape(counted.name)),
        classes=len(counted.class_names),
        images=counted.split_counts.get(report.split, 0),
        mark=lambda name: f"<b>{escape(name)}</b>",
    )
    samples = _samples(report)
    page = environment.get_template("report.html.j2")
    return page.render(
        report=report,
        columns=COLUMNS,
        cell=lambda method, metric, posthoc: shown(summary, method, metric, posthoc),
        plain=plain,
        lead=_words([plain.tried, plain.best]),
        meaning=_words([plain.meaning]),
        caveats=[_words([caveat]) for caveat in plain.caveats],
        verdict=_words(sentences),
        seeds=_seeds(summary),
        one_seed=summary["count"].max() == 1,
        complete=in_table["mean"].count() == len(report.methods) * (2 * len(COLUMNS) + 1),
        compared=is_compared(summary),
        baseline=baseline_of(report.methods) if summary["p_holm"].count() else None,
        significant=SIGNIFICANT,
        posthocs=_posthocs(summary),
        posthoc_columns=POSTHOC_COLUMNS,
        lowest=lambda method, metric: lowest(summary, method, metric, _posthocs(summary)),
        shifts=[] if report.shift_metrics is None else shift_tables(report.shift_metrics, report.methods),
        tracks=[_track(rows, report.methods, metric) for metric in ("nll", "ece")],
        reliability={n: diagram(r, report.n_bins) for n, r in report.reliability.items() if is_drawable(r)},
        annotators=[
            (a, diagram(a.reliability, report.n_bins) if a.reliability and is_drawable(a.reliability) else None)
            for a in report.annotators
        ],
        box=(WIDTH, HEIGHT),
        gallery=[_set(mixed) for mixed in report.gallery[:MAX_SETS]],
        samples=samples,
        per_row=max((len(images) for _, *kinds in samples for images in kinds), default=1),
        limits={"sets": MAX_SETS, "classes": MAX_CLASSES},
        pixelated=max(report.dataset.image_shape[:2]) < PIXELATED_BELOW,
    )


def data_uri(image: Picture) -> str:
    """Encode an image uint8 (H, W), (H, W, 1) or (H, W, 3) as WebP in a ``data:`` URI, made smaller if large."""
    pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    if image.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)):
        raise ValueError(f"image must be uint8 (H, W, 1 or 3), got {image.dtype} {image.shape}")
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", lossless=max(picture.size) < LOSSLESS_BELOW, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def breakable(name: str) -> Markup:
    """Escape ``name`` and let it break after each ``_``, ``-`` or ``/`` on narrow screens."""
    return Markup(re.sub(r"([_/-])(?=.)", r"\1<wbr>", str(escape(name))))


def duration(seconds: float) -> str:
    """Write a time as people do: ``0.4 s``, ``32 s``, ``1 min 32 s``, ``2 h 03 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _words(sentences: Sequence[str]) -> Markup:
    """Sentences whose names are escaped, with numbers and their units kept together."""
    return Markup(re.sub(r" (?=±|%)|(?<=±) ", "\u00a0", " ".join(sentences)))


def _seeds(summary: pl.DataFrame) -> str:
    counts: list[int] = sorted(summary["count"].to_list()) or [0]
    number = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"{number} seed{'' if counts[-1] == 1 else 's'}"


def _posthocs(summary: pl.DataFrame) -> list[str]:
    """Post-hoc methods, if there are more than those that the table of results shows."""
    names = summary["posthoc"].unique(maintain_order=True).to_list()
    return names if set(names) - {NONE, TEMPERATURE} else []


def _track(rows: pl.DataFrame, methods: Sequence[Method], metric: str) -> dict[str, Any]:
    """Lay out the dot plot of ``metric``: seeds and mean, before and after, in per cent of the width."""
    column = next(column for column in COLUMNS if column.metric == metric)
    rows = rows.filter(pl.col("metric") == metric, pl.col("posthoc").is_in([NONE, TEMPERATURE]), pl.col("value").is_finite())
    values = (100 * rows["value"]).to_list()
    if not values:
        return {"column": column, "ticks": [], "rows": {}}
    ticks = nice_ticks(min(values), max(values), include_zero=metric == "ece")

    def place(value: float) -> float:
        return round(3 + 94 * (value - ticks[0]) / (ticks[-1] - ticks[0]), 2)

    lines: dict[str, dict[str, Any]] = {method.name: {"before": None, "after": None} for method in methods}
    for (name, posthoc), group in rows.group_by("method", "posthoc"):
        seeds = (100 * group["value"]).to_list()
        lines[str(name)]["before" if posthoc == NONE else "after"] = {
            "mean": place(sum(seeds) / len(seeds)),
            "seeds": [place(value) for value in seeds],
        }
    return {"column": column, "ticks": [(place(tick), f"{tick:g}") for tick in ticks], "rows": lines}


def _set(mixed: MixedSet) -> dict[str, Any]:
    cells = sorted(mixed.cells, key=lambda cell: cell.lam)
    annotators = list(dict.fromkeys(name for cell in cells for name in cell.annotations))
    notes = {n: [(c.lam, c.annotations[n]) for c in cells if n in c.annotations] for n in annotators}
    return {
        "mixed": mixed,
        "cells": cells,
        "annotators": annotators,
        "curves": {name: [(lam, note.share) for lam, note in pairs] for name, pairs in notes.items()},
        "knows_all": {n: any(note.outside is not None for _, note in pairs) for n, pairs in notes.items()},
    }


def _samples(report: Report) -> list[tuple[str, Sequence[Picture], Sequence[Picture]]]:
    """Join data and generator samples by class, in the data set's order, as many as a page shows."""
    data, generated = dict(report.data_samples), dict(report.generator_samples)
    order = {name: index for index, name in enumerate(report.dataset.class_names)}
    names = sorted({**data, **generated}, key=lambda name: order.get(name, len(order)))[:MAX_CLASSES]
    return [(n, data.get(n, ())[:MAX_SAMPLES], generated.get(n, ())[:MAX_SAMPLES]) for n in names]
