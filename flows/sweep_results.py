"""What came of a sweep: its trials measured, ranked, as a table, and which settings mattered."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl
import torch
from rich.table import Table
from scipy import stats

from csm import tables
from csm.metrics import METRICS, evaluate
from csm.posthoc import apply_posthoc, fit_posthoc
from csm.runs import RunSpec
from csm.search.importance import Importance
from csm.search.pareto import pareto_front
from csm.search.space import SearchSpace
from csm.statistics import BOOTSTRAPPED, bootstrap, interval
from flows.evaluate import split_logits
from flows.summary import COLUMNS, NONE
from flows.sweep_records import Estimate, TrialRecord
from flows.sweeps import TuneConfig

ALWAYS = ("accuracy", "ece", "nll", "brier")  # measured beside the objectives
DRAWS = 1000  # of an interval
SHOWN = 10  # trials in the terminal's table
UNITS = {column.metric: column.unit for column in COLUMNS}


def measured(tune: TuneConfig) -> tuple[str, ...]:
    """The metrics of a sweep, its objectives first."""
    return tuple(dict.fromkeys((*tune.objectives, *ALWAYS)))


def measure(specs: Sequence[RunSpec], split: str, tune: TuneConfig, bins: int, n_classes: int) -> dict[str, Estimate]:
    """Metrics of a trial on ``split`` after ``tune.posthoc``, which is fitted on validation: means over the seeds of ``specs``.

    Intervals are those of ``csm.statistics.bootstrap``, over seeds and images; of metrics that it cannot resample, Student's over the
    seeds, if there are two.
    """
    runs = []
    for spec in specs:
        logits, labels = split_logits(spec, split, n_classes)
        if tune.posthoc != NONE:
            logits = apply_posthoc(logits, fit_posthoc(tune.posthoc, *split_logits(spec, "val", n_classes), where=spec.run))
        runs.append((logits, labels))
    names = measured(tune)
    values = [evaluate(logits, labels, n_bins=bins, metrics=names) for logits, labels in runs]
    resampled = [name for name in names if name in BOOTSTRAPPED]
    log_probs = [(logits.double().log_softmax(dim=1), labels) for logits, labels in runs]
    draws = bootstrap({"": log_probs}, resampled, bins, DRAWS)[""]
    estimates: dict[str, Estimate] = {}
    for name in names:
        seeds = torch.tensor([value[name] for value in values], dtype=torch.float64)
        mean = seeds.mean().item()
        estimates[name] = (mean, *(interval(draws[name]) if name in draws else _student(seeds)))
    return estimates


def _student(seeds: torch.Tensor) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of ``seeds`` (S,), by Student's t."""
    if len(seeds) < 2:
        return None, None
    half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.std().item() / len(seeds) ** 0.5
    return seeds.mean().item() - half, seeds.mean().item() + half


def ranking(records: Iterable[TrialRecord], tune: TuneConfig) -> list[TrialRecord]:
    """The trials that were done, best first by the first objective; of equal ones the earlier first."""
    sign = -1 if METRICS[tune.objectives[0]].higher_is_better else 1
    return sorted(
        (record for record in records if record.status == "done"),
        key=lambda record: (sign * record.val[tune.objectives[0]][0], record.number),
    )


def front(records: Iterable[TrialRecord], tune: TuneConfig) -> set[int]:
    """Numbers of the trials on the Pareto front of the objectives; of accuracy and ECE if there is one objective alone."""
    done = [record for record in records if record.status == "done"]
    names = front_metrics(tune)
    values = [[record.val[name][0] for name in names] for record in done]
    return {record.number for record, is_on in zip(done, pareto_front(values, names), strict=True) if is_on}


def front_metrics(tune: TuneConfig) -> tuple[str, ...]:
    """What the Pareto front is of."""
    return tune.objectives if len(tune.objectives) > 1 else ("accuracy", "ece")


def sweep_table(
    records: Sequence[TrialRecord],
    space: SearchSpace,
    tune: TuneConfig,
    test: Mapping[int, Mapping[str, Estimate]],
    runs: Mapping[int, str | None],
) -> tuple[pl.DataFrame, tables.Schema]:
    """``sweep.parquet`` and its schema (``csm.tables.sweep``), trials by number.

    Args:
        records: of trials that ended.
        space, tune: what was searched and how.
        test: number -> its metrics on test, for the chosen ones.
        runs: number -> id of its MLflow run.
    """
    metrics = measured(tune)
    columns = {key: _dtype(record.values.get(key) for record in records) for key in space.keys}
    schema = tables.sweep(columns, metrics)
    place = {record.number: rank for rank, record in enumerate(ranking(records, tune), 1)}
    best = front(records, tune)
    rows = []
    for record in records:
        row: dict[str, Any] = {
            "trial": record.number,
            "status": record.status,
            "error": record.error or None,
            "run": runs.get(record.number),
            "seeds": tune.seeds if record.status == "done" else 0,
            "epochs": record.epochs,
            "seconds": record.seconds,
            "rank": place.get(record.number),
            "pareto": record.number in best,
        }
        row |= {f"param.{key}": _cell(record.values.get(key), dtype) for key, dtype in columns.items()}
        for split, estimates in (("val", record.val), ("test", test.get(record.number, {}))):
            for name in metrics:
                row |= dict(zip(_ends(split, name), estimates.get(name, (None, None, None)), strict=True))
        rows.append(row)
    return pl.DataFrame(rows, schema=dict(schema)), schema


def _ends(split: str, metric: str) -> tuple[str, str, str]:
    name = f"{split}.{metric}"
    return name, f"{name}.low", f"{name}.high"


def _dtype(values: Iterable[Any]) -> pl.DataType:
    """Of a column that holds ``values``: text unless they are all numbers, or all true or false."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pl.Boolean()
    if kinds == {int}:
        return pl.Int64()
    return pl.Float64() if kinds and kinds <= {int, float} else pl.String()


def _cell(value: Any, dtype: pl.DataType) -> Any:
    if value is None or dtype != pl.String():
        return float(value) if value is not None and dtype == pl.Float64() else value
    return str(value)


def trials_table(records: Sequence[TrialRecord], tune: TuneConfig, test: Mapping[int, Mapping[str, Estimate]]) -> Table:
    """The best trials, and those of the Pareto front, for the terminal."""
    best, ranked = front(records, tune), ranking(records, tune)
    shown = [record for place, record in enumerate(ranked) if place < SHOWN or record.number in best]
    failed = sum(record.status == "failed" for record in records)
    stopped = sum(record.status == "stopped" for record in records)
    after = "" if tune.posthoc == NONE else f", after {tune.posthoc}"
    title = f"{len(ranked)} trials done, {stopped} stopped, {failed} failed; by {tune.objectives[0]} on validation{after}"
    shares = (
        f"* Pareto front of {' and '.join(front_metrics(tune))}; in brackets: on test, for chosen trials; 95 % interval below"
    )
    table = Table(title=title, caption=shares)
    metrics = measured(tune)
    table.add_column("trial", justify="right")
    for name in metrics:
        table.add_column(_heading(name), justify="right")
    table.add_column("tried", overflow="fold", min_width=24)
    names = short_names(key for record in shown for key in record.values)
    for record in shown:
        tried = ", ".join(f"{names[key]} {_number(value)}" for key, value in record.values.items())
        on_test = test.get(record.number, {})
        cells = [_estimate(record.val[name], on_test.get(name), is_long=name == tune.objectives[0]) for name in metrics]
        table.add_row(f"{record.number}{'*' if record.number in best else ' '}", *cells, tried)
    return table


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last parts, as few as tell it from the other keys."""
    parts = {key: key.split(".") for key in keys}
    names = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        enough = (count for count in range(1, len(own)) if not any(other[-count:] == own[-count:] for other in others))
        names[key] = ".".join(own[-next(enough, len(own)) :])
    return names


def importance_table(found: Sequence[Importance], objective: str) -> Table:
    """How much of the objective's variance each setting explains, for the terminal."""
    table = Table(title=f"What mattered for {objective} on validation: share of its variance (fANOVA)")
    for heading in ("setting", "beside", "share", "trials"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("share", "trials") else "left")
    for item in found:
        table.add_row(item.key, item.beside, f"{item.share:.2f}", str(item.trials))
    return table


def _heading(metric: str) -> str:
    return f"{metric} {UNITS.get(metric, '×100')}"


def _estimate(estimate: Estimate, on_test: Estimate | None, is_long: bool) -> str:
    mean, low, high = (None if end is None else f"{100 * end:.1f}" for end in estimate)
    told = f"{mean} ({100 * on_test[0]:.1f})" if on_test is not None else str(mean)
    return f"{told}\n{low}-{high}" if is_long and low is not None else told


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
