"""compare: what differs between trained classifiers, in configuration and in every metric, with paired intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from csm.errors import InputError
from csm.metrics import METRICS, evaluate
from csm.posthoc import Posthoc, apply_posthoc, fit_posthoc
from csm.statistics import bootstrap, compare_draws, interval
from flows import run_names
from flows.config import EvaluateConfig
from flows.reliability import Predictions, Reliability
from flows.run_names import Trained, find
from flows.summary import COLUMNS, NONE, TEMPERATURE

BINS = EvaluateConfig().bins  # as `csm evaluate` unless it is told otherwise
DRAWS = EvaluateConfig().draws
SAME_LABELS = "brier_uncertainty"  # a property of the labels, which all have in common
NAMES = tuple(dict.fromkeys([*(column.metric for column in COLUMNS), *(name for name in METRICS if name != SAME_LABELS)]))
SCHEMA = {
    "run": pl.String(),
    "posthoc": pl.String(),
    "metric": pl.String(),
    "mean": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "difference": pl.Float64(),
    "difference_low": pl.Float64(),
    "difference_high": pl.Float64(),
    "p": pl.Float64(),
}
Split = tuple[Tensor, Tensor]  # logits float32 (N, K) and labels int64 (N,)


@dataclass(frozen=True)
class Compared:
    """What ``csm compare`` shows.

    Attributes:
        trained: the baseline, and what is compared with it.
        split: the images they were measured on.
        images: how many those are.
        seeds: of each of ``trained`` those that were compared, paired in this order.
        settings: those that differ, see ``run_names.changed_settings``.
        metrics: ``SCHEMA``; fractions. ``mean`` is over seeds; intervals and ``p`` are there for accuracy, ECE, NLL and Brier score.
            ``p`` is corrected (Holm) for as many as are compared with the baseline.
        temperatures: of each of ``trained``, mean over seeds.
        reliability: predictions of each of ``trained``.
    """

    trained: tuple[Trained, ...]
    split: str
    images: int
    seeds: tuple[tuple[int, ...], ...]
    settings: Mapping[str, Sequence[str | None]]
    metrics: pl.DataFrame
    temperatures: tuple[float, ...]
    reliability: tuple[Reliability, ...]

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.trained]

    def row(self, run: str, metric: str, posthoc: str) -> dict[str, Any]:
        """The row of ``metrics``."""
        return self.metrics.row(
            by_predicate=(pl.col("run") == run) & (pl.col("metric") == metric) & (pl.col("posthoc") == posthoc), named=True
        )


def compare(names: Sequence[str], workspace: Path, draws: int = DRAWS) -> Compared:
    """Compare the classifiers called ``names`` (see ``run_names.find``) with the first of them.

    Raises:
        InputError: fewer than two names, one twice, one that is not found, other images or labels than the baseline's,
            or no seed in common.
    """
    if len(names) < 2:
        raise InputError(f"compare: give two or more of methods, runs and trials, got {len(names)}")
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice:
        raise InputError(f"compare: {twice} is given twice")
    trained = [find(name, workspace) for name in names]
    split = "val" if any(each.split == "val" for each in trained) else "test"
    seeds = _paired_seeds(trained)
    of_split = [[_read(each, seed, split) for seed in of] for each, of in zip(trained, seeds, strict=True)]
    _check_same_images(trained, seeds, of_split, split)
    runs = [[_logits(frame) for frame in frames] for frames in of_split]
    fitted = [
        [
            fit_posthoc(TEMPERATURE, *_logits(frame if split == "val" else _read(each, seed, "val")), where=each.name)
            for seed, frame in zip(of, frames, strict=True)
        ]
        for each, of, frames in zip(trained, seeds, of_split, strict=True)
    ]
    none = [[Posthoc(NONE, {}) for _ in of] for of in seeds]
    measured = [
        frame
        for posthoc, values in ((NONE, none), (TEMPERATURE, fitted))
        for frame in _measure([each.name for each in trained], runs, posthoc, values, draws)
    ]
    return Compared(
        trained=tuple(trained),
        split=split,
        images=len(of_split[0][0]),
        seeds=tuple(seeds),
        settings=run_names.changed_settings(trained),
        metrics=pl.concat(measured),
        temperatures=tuple(float(np.mean([each.values["temperature"] for each in of])) for of in fitted),
        reliability=tuple(_reliability(*pair) for pair in zip(runs, fitted, strict=True)),
    )


def as_json(compared: Compared) -> dict[str, Any]:
    """All of it but the diagrams, for programs."""
    return {
        "baseline": compared.names[0],
        "split": compared.split,
        "images": compared.images,
        "runs": [
            {
                "name": each.name,
                "folders": [str(each.folders[seed]) for seed in seeds],
                "seeds": list(seeds),
                "old_labels": sorted(each.old_labels.intersection(seeds)),
                "temperature": temperature,
                "seconds": round(float(np.mean([each.seconds[seed] for seed in seeds])), 3),
            }
            for each, seeds, temperature in zip(compared.trained, compared.seeds, compared.temperatures, strict=True)
        ],
        "configuration": {key: list(values) for key, values in compared.settings.items()},
        "metrics": compared.metrics.to_dicts(),
    }


def _paired_seeds(trained: Sequence[Trained]) -> list[tuple[int, ...]]:
    """Those that all have; of single trainings each its own."""
    if all(len(each.folders) == 1 for each in trained):
        return [tuple(each.folders) for each in trained]
    common = [seed for seed in trained[0].folders if all(seed in each.folders for each in trained)]
    if not common:
        having = "; ".join(f"{each.name} has {', '.join(map(str, each.folders))}" for each in trained)
        raise InputError(f"compare: no seed in common: {having}")
    return [tuple(common) for _ in trained]


def _read(trained: Trained, seed: int, split: str) -> pl.DataFrame:
    frame = run_names.predictions(trained.folders[seed], split)
    if frame.is_empty():
        raise InputError(f"{trained.name}: {trained.folders[seed]} has no predictions on {split}")
    return frame


def _check_same_images(
    trained: Sequence[Trained], seeds: Sequence[Sequence[int]], frames: Sequence[Sequence[pl.DataFrame]], split: str
) -> None:
    first = frames[0][0]
    for each, of, own in zip(trained, seeds, frames, strict=True):
        for seed, frame in zip(of, own, strict=True):
            same = frame.select("image_id", "label").equals(first.select("image_id", "label"))
            if not same or frame.schema["logits"] != first.schema["logits"]:
                raise InputError(
                    f"{each.name} (seed {seed}) was measured on other {split} images or labels than {trained[0].name}: "
                    "compare classifiers of the same data"
                )


def _logits(frame: pl.DataFrame) -> Split:
    return torch.from_numpy(frame["logits"].to_numpy().copy()), torch.from_numpy(frame["label"].to_numpy().astype(np.int64))


def _measure(
    names: Sequence[str], runs: Sequence[Sequence[Split]], posthoc: str, fitted: Sequence[Sequence[Posthoc]], draws: int
) -> list[pl.DataFrame]:
    """Rows of ``SCHEMA`` after ``posthoc``: all metrics, those that can be resampled with intervals and tests."""
    scores = {
        name: [(apply_posthoc(logits, of), labels) for (logits, labels), of in zip(run, values, strict=True)]
        for name, run, values in zip(names, runs, fitted, strict=True)
    }
    means = {}
    for name, run in zip(names, runs, strict=True):
        # As trained, not through log-probabilities, as `csm evaluate` does.
        seeds = [
            evaluate(logits if posthoc == NONE else log_probs, labels, n_bins=BINS, metrics=NAMES)
            for (logits, labels), (log_probs, _) in zip(run, scores[name], strict=True)
        ]
        means[name] = {metric: float(np.mean([seed[metric] for seed in seeds])) for metric in NAMES}
    drawn = bootstrap(scores, n_bins=BINS, draws=draws)
    against = {(row["method"], row["metric"]): row for row in compare_draws(drawn, names[0]).iter_rows(named=True)}
    rows = []
    for name in names:
        for metric in NAMES:
            of = against.get((name, metric), {})
            ends = interval(drawn[name][metric], least=0.0) if metric in drawn[name] else (None, None)
            difference = None if name == names[0] else means[name][metric] - means[names[0]][metric]
            rows.append(
                (name, posthoc, metric, means[name][metric], *ends, difference, of.get("low"), of.get("high"), of.get("p_holm"))
            )
    return [pl.DataFrame(rows, schema=SCHEMA, orient="row")]


def _reliability(run: Sequence[Split], fitted: Sequence[Posthoc]) -> Reliability:
    before, after, correct = [], [], []
    for (logits, labels), posthoc in zip(run, fitted, strict=True):
        top = logits.double().softmax(dim=1).max(dim=1)
        before.append(top.values)
        after.append(apply_posthoc(logits, posthoc).exp().amax(dim=1))
        correct.append(top.indices == labels)
    sides = [torch.stack(column).numpy() for column in (before, after, correct)]  # (S, N)
    return Reliability(Predictions(sides[0], sides[2]), Predictions(sides[1], sides[2]))


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
