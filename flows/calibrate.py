"""calibrate: logits and labels of any classifier -> post-hoc calibration, fitted, measured and chosen."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from rich.table import Table
from torch import Tensor

from csm import storage, tables
from csm.assessment import DRAWS, Assessment, assess
from csm.errors import InputError
from csm.logits_files import LogitsFile, read_logits
from csm.metrics.calibration import top_label
from csm.parameters import check_name
from csm.posthoc import POSTHOC, Posthoc, apply_posthoc, fit_posthoc
from csm.posthoc.cross_fitting import can_cross_fit, cross_fitted, least_nll
from flows import pages
from flows.measures import MEASURES, best_of, chance_sentence, plain
from flows.progress import say, task
from flows.reliability import Predictions, Reliability, diagram

NONE = "none"
SHOWN = ("accuracy", "ece", "smooth_ece", "nll", "brier")  # on the terminal
RESAMPLES = 100  # fewer than of one model: there are up to eight methods
VAL, TEST = "val", "test"  # in a column `split`: what fits and what measures


class Calibrated(NamedTuple):
    """A fitted method: on all rows of the file of logits; ``assessment`` is of rows that it was not fitted on."""

    posthoc: Posthoc
    log_probs: Tensor  # float64 (N, K), of those rows
    assessment: Assessment


def calibrate(
    logits: Path,
    test: Path | None = None,
    posthoc: str = "all",
    bins: int = 15,
    draws: int = DRAWS,
    output: Path | None = None,
    command: str = "",
) -> tuple[dict[str, Any], dict[str, Calibrated]]:
    """Fit the methods ``posthoc`` (names with commas, or "all") to the file ``logits``, and choose that of least cross-fitted NLL.

    They are measured on ``test``, or on the split "test" if the file tells "val" and "test" apart, else cross-fitted: each row by what was
    fitted to the other four fifths.

    Returns:
        What ``--json`` prints, and each method, "none" first. With ``output`` the folder holds ``calibration.json``, the calibrated
        ``probabilities.parquet`` of the measured rows, ``report.html`` and ``calibrate.json`` then.

    Raises:
        InputError: a file cannot be used, a method is unknown, or there are too few rows for it.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; choose a folder")
    fit, held_out, rows = _open(logits, test)
    names = _methods(posthoc, fit)
    with task("calibrate", 6 * len(names)) as progress:
        fitted = {name: cross_fitted(name, fit.logits, fit.labels, str(fit.path), progress.advance) for name in names}
        chosen, scores = least_nll(fitted, fit.labels)
        methods = {}
        for name in names:
            model = fit_posthoc(name, fit.logits, fit.labels, str(fit.path))
            log_probs = fitted[name] if held_out is None else apply_posthoc(held_out.logits, model)
            labels = (held_out or fit).labels
            methods[name] = Calibrated(model, log_probs, assess(log_probs, labels, bins, draws, resamples=RESAMPLES))
            progress.advance()
    for name, method in methods.items():
        if method.posthoc.note:
            say(f"  {name}: {method.posthoc.note}")
    result = {
        "logits": str(logits),
        "test": str(test) if test else f"split {TEST}" if held_out else None,
        "fitted_on": len(fit.labels),
        "measured_on": len((held_out or fit).labels),
        "classes": fit.logits.shape[1],
        "bins": bins,
        "chosen": chosen,
        "methods": {
            name: {"cross_fitted_nll": scores[name], "note": method.posthoc.note, **plain(method.assessment)}
            for name, method in methods.items()
        },
        "output": None if output is None else str(output),
    }
    if output is not None:
        _write(output, result, methods, (held_out or fit).labels, rows, bins, draws, command)
    return result, methods


def table(methods: dict[str, Calibrated], chosen: str) -> Table:
    """The most important metrics of each method, for a terminal."""
    shown = Table(title="Calibration, with 95 % intervals")
    shown.add_column("method")
    for metric in SHOWN:
        shown.add_column(f"{MEASURES[metric].label} {MEASURES[metric].unit}".strip(), justify="right")
    estimates = {metric: {name: method.assessment.metrics[metric] for name, method in methods.items()} for metric in SHOWN}
    best = {metric: best_of(metric, of_metric) for metric, of_metric in estimates.items()}
    for name in methods:
        cells = []
        for metric in SHOWN:
            estimate = estimates[metric][name]
            text = MEASURES[metric].text(estimate.value)
            text = f"[bold]{text}[/bold]" if name in best[metric] else text
            cells.append(f"{text} [dim]{MEASURES[metric].interval(estimate)}[/dim]")
        shown.add_row(f"[bold]{name}[/bold] *" if name == chosen else name, *cells)
    return shown


def sentences(result: dict[str, Any], methods: dict[str, Calibrated]) -> tuple[str, str]:
    """What was chosen and what it changes, and what chance alone makes of the ECE."""
    chosen = result["chosen"]
    before, after = (methods[name].assessment.metrics for name in (NONE, chosen))
    on = (
        f"{result['measured_on']:,} test rows"
        if result["test"]
        else f"{result['measured_on']:,} rows, each by a fit to the other four fifths"
    )
    if chosen == NONE:
        verdict = f"No method has a lower cross-fitted NLL than the logits as they are: nothing to mend. Measured on {on}."
    else:
        changes = ", ".join(_change(metric, before[metric].value, after[metric].value) for metric in ("nll", "ece", "accuracy"))
        verdict = f"{chosen} has the least cross-fitted NLL. Before and after: {changes} (measured on {on})."
    return verdict, chance_sentence(methods[chosen].assessment)


def _change(metric: str, before: float, after: float) -> str:
    """``NLL 0.324 → 0.319 nats``, or ``accuracy 89.5 % as before``."""
    measure = MEASURES[metric]
    name = "accuracy" if metric == "accuracy" else measure.label
    old, new = measure.text(before), f"{measure.text(after)} {measure.unit}".rstrip()
    return f"{name} {new} as before" if measure.text(after) == old else f"{name} {old} → {new}"


def _open(logits: Path, test: Path | None) -> tuple[LogitsFile, LogitsFile | None, Sequence[int]]:
    """What to fit on, what to measure on (None: the same, cross-fitted), and the row numbers of the latter in their file."""
    fit = read_logits(logits)
    rows: Sequence[int] = range(len(fit.labels))
    held_out = None
    if test is not None:
        held_out = read_logits(test)
        rows = range(len(held_out.labels))
    elif {VAL, TEST} <= set(fit.splits):
        rows = [row for row, split in enumerate(fit.splits) if split == TEST]
        fit, held_out = fit.split(VAL), fit.split(TEST)
    if held_out is not None and held_out.logits.shape[1] != fit.logits.shape[1]:
        raise InputError(f"{held_out.path}: logits of {held_out.logits.shape[1]} classes; {fit.path} has {fit.logits.shape[1]}")
    if held_out is not None and torch.equal(held_out.logits, fit.logits):
        raise InputError(
            f"--test {held_out.path}: holds the rows of {fit.path}, to which is fitted; give others, or leave --test out: "
            "then they are cross-fitted"
        )
    found = fit.labels.unique()
    if len(found) < 2:
        raise InputError(
            f"{fit.path}: all {len(fit.labels)} labels are {found.item()}: at least 2 classes are needed to calibrate"
        )
    return fit, held_out, rows


def _methods(posthoc: str, fit: LogitsFile) -> tuple[str, ...]:
    """The methods that are fitted, "none" first; of "all" those that the rows suffice for."""
    images = len(fit.labels)
    if posthoc == "all":
        kept = tuple(name for name in POSTHOC if can_cross_fit(name, images))
        left_out = [name for name in POSTHOC if name not in kept]
        if left_out:
            say(f"  left out, as {images} rows are too few: {', '.join(left_out)}")
        return kept
    names = tuple(dict.fromkeys((NONE, *(name.strip() for name in posthoc.split(",")))))
    for name in names:
        check_name("--posthoc", name, (*POSTHOC, "all"))
        if not can_cross_fit(name, images):
            raise InputError(
                f"{fit.path}: {images} rows are too few to fit and measure {name}; give more, or leave it out of --posthoc"
            )
    return names


def _write(
    output: Path,
    result: dict[str, Any],
    methods: dict[str, Calibrated],
    labels: Tensor,
    rows: Sequence[int],
    bins: int,
    draws: int,
    command: str,
) -> None:
    chosen = methods[result["chosen"]]
    storage.write_json(output / "calibration.json", asdict(chosen.posthoc))
    probs = chosen.log_probs.exp().numpy()
    schema = tables.calibrated(probs.shape[1])
    columns = [pl.Series(rows), pl.Series(labels.numpy()), *(pl.Series(probs[:, k]) for k in range(probs.shape[1]))]
    frame = pl.DataFrame([column.cast(dtype).alias(name) for column, (name, dtype) in zip(columns, schema.items(), strict=True)])
    tables.write(frame, output / "probabilities.parquet", schema)
    before = _predictions(methods[NONE].log_probs, labels)
    views = {
        name: diagram(Reliability(before, None if name == NONE else _predictions(method.log_probs, labels)), bins)
        for name, method in methods.items()
    }
    page = pages.render(
        "calibrate.html.j2",
        title=f"Calibration of {Path(result['logits']).name}",
        created=datetime.now(UTC),
        command=command,
        result=result,
        sentences=sentences(result, methods),
        columns={name: method.assessment.metrics for name, method in methods.items()},
        notes={name: method.posthoc.note for name, method in methods.items()},
        values={name: method.posthoc.values for name, method in methods.items()},
        views=views,
        n_bins=bins,
        draws=draws,
    )
    storage.write_text(output / "report.html", page)
    storage.write_json(output / "calibrate.json", result)


def _predictions(log_probs: Tensor, labels: Tensor) -> Predictions:
    confidence, correct = top_label(log_probs.exp(), labels)
    return Predictions(confidence.numpy().astype(np.float64), correct.to(torch.bool).numpy())


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
