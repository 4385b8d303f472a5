"""What the report says of a sweep: read from ``sweep.parquet``, laid out as tables and plots."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from csm import storage, tables
from csm.metrics import METRICS
from csm.search.importance import Importance
from flows.scatter import Scatter, scatter
from flows.sweep_records import SweepFolder
from flows.sweep_results import short_names

TOP, MOST_FAILED, MOST_PARAMETERS = 10, 20, 12  # of trials in a table, and of plots
TIMES_100 = ("accuracy", "ece", "aece", "nll", "brier")
LABELS = {"accuracy": "Accuracy %", "ece": "ECE %", "aece": "AECE %", "nll": "NLL ×100", "brier": "Brier ×100"}


@dataclass(frozen=True)
class Trial:
    """A row of a table: the settings and figures that are shown, as texts."""

    number: int
    rank: str
    pareto: bool
    settings: Sequence[tuple[str, str]]
    figures: Sequence[str]
    error: str = ""


@dataclass(frozen=True)
class Sweep:
    """A sweep as the page shows it; ``importance`` is (setting, beside which choice, share of the variance)."""

    trials: int
    failed: int
    stopped: int
    objective: str
    heads: Sequence[str]
    best: Trial | None
    top: Sequence[Trial]
    failures: Sequence[Trial]
    progress: Scatter | None
    front: Scatter | None
    parameters: Sequence[Scatter]
    importance: Sequence[tuple[str, str, float]]


def read_sweep(root: Path) -> Sweep | None:
    """The sweep of the workspace ``root``, or None if there was none.

    Raises:
        InputError: ``sweep.parquet`` is damaged or another table.
    """
    folder = SweepFolder(root)
    if not folder.table.is_file():
        return None
    found = storage.read_json(folder.importance) if folder.importance.is_file() else []
    return lay_out(*tables.read_sweep(folder.table), [Importance(**item) for item in found])


def lay_out(frame: pl.DataFrame, parameters: Sequence[str], metrics: Sequence[str], importance: Sequence[Importance]) -> Sweep:
    """What the page shows of ``frame``, a table of ``csm.tables.sweep``."""
    rows = frame.sort("trial").to_dicts()
    objective = metrics[0]
    splits = [
        split
        for split in ("val", "test")
        if frame.select(pl.col(f"^{split}\\..*$")).select(pl.all().count()).sum_horizontal().sum()
    ]
    columns = [f"{split}.{metric}" for split in splits for metric in metrics]
    heads = [f"{'validation' if name.startswith('val.') else 'test'} {label(name.partition('.')[2])}" for name in columns]

    short = short_names(parameters)

    def trial(row: Mapping[str, Any]) -> Trial:
        settings = [(short[key], setting(row[f"param.{key}"])) for key in parameters if row[f"param.{key}"] is not None]
        error = (row["error"] or "").strip()
        return Trial(
            row["trial"], str(row["rank"] or ""), bool(row["pareto"]), settings, [_figure(row, name) for name in columns], error
        )

    ranked = sorted((row for row in rows if row["rank"] is not None), key=lambda row: row["rank"])
    failed = [row for row in rows if row["status"] == "failed"]
    return Sweep(
        len(rows),
        len(failed),
        sum(row["status"] == "stopped" for row in rows),
        label(objective),
        heads,
        trial(ranked[0]) if ranked else None,
        [trial(row) for row in ranked[:TOP]],
        [trial(row) for row in failed[:MOST_FAILED]],
        _progress(rows, objective, max if METRICS[objective].higher_is_better else min),
        _front(rows, metrics),
        _parameters(rows, parameters, objective),
        [(item.key, item.beside, item.share) for item in importance],
    )


def label(metric: str) -> str:
    """A metric with its unit, as a table heads it."""
    return LABELS.get(metric, metric)


def setting(value: Any) -> str:
    """A value that was tried, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _scale(name: str) -> float:
    return 100.0 if name.rpartition(".")[2] in TIMES_100 else 1.0


def _figure(row: Mapping[str, Any], name: str) -> str:
    """A mean with the ends of its interval."""
    if row[name] is None:
        return ""
    mean, low, high = (
        None if value is None else _scale(name) * value for value in (row[name], row[f"{name}.low"], row[f"{name}.high"])
    )
    return f"{mean:.1f}" + (f" ({low:.1f} to {high:.1f})" if low is not None and high is not None else "")


def _measured(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[Mapping[str, Any], float]]:
    return [(row, _scale(name) * row[name]) for row in rows if row[name] is not None and math.isfinite(row[name])]


def _kind(row: Mapping[str, Any]) -> str:
    return "first" if row["rank"] == 1 else "front" if row["pareto"] else "stopped" if row["status"] == "stopped" else "other"


def _progress(rows: Sequence[Mapping[str, Any]], objective: str, better: Callable[[float, float], float]) -> Scatter | None:
    """The objective trial by trial, with the best of those that finished so far."""
    measured = _measured(rows, f"val.{objective}")
    line: list[tuple[float, float]] = []
    for row, value in measured:
        if row["status"] == "done":
            best = better(line[-1][1], value) if line else value
            line += [(row["trial"], line[-1][1])] if line else []
            line.append((row["trial"], best))
    points = [(float(row["trial"]), value, _kind(row), f"trial {row['trial']}: {value:.2f}") for row, value in measured]
    return scatter(f"{label(objective)} by trial", "trial", label(objective), points, line)


def _front(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Scatter | None:
    """Accuracy against ECE."""
    if not {"accuracy", "ece"} <= set(metrics):
        return None
    both = [(row, x) for row, x in _measured(rows, "val.ece") if row["val.accuracy"] is not None and row["status"] == "done"]
    points = [
        (
            x,
            100 * row["val.accuracy"],
            _kind(row),
            f"trial {row['trial']}: ECE {x:.1f} %, accuracy {100 * row['val.accuracy']:.1f} %",
        )
        for row, x in both
    ]
    return scatter("Accuracy against ECE", "ECE %", "Accuracy %", points)


def _parameters(rows: Sequence[Mapping[str, Any]], parameters: Sequence[str], objective: str) -> list[Scatter]:
    """The objective against each setting that was varied."""
    found = []
    for key in parameters:
        tried = [(row, value) for row, value in _measured(rows, f"val.{objective}") if row[f"param.{key}"] is not None]
        values = [row[f"param.{key}"] for row, _ in tried]
        if len(set(values)) < 2:
            continue
        texts = any(isinstance(value, str | bool) for value in values)
        points = [
            (setting(x) if texts else float(x), y, _kind(row), f"trial {row['trial']}: {key} {setting(x)}, {y:.2f}")
            for (row, y), x in zip(tried, values, strict=True)
        ]
        plot = scatter(key, "", label(objective), points)
        if plot is not None:
            found.append(plot)
    return found[:MOST_PARAMETERS]
