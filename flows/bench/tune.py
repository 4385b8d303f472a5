"""bench tune: what a sweep through Ray Tune costs, in time against bare processes that train the same."""

import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.resources import Group
from cluster.session import session
from cluster.tuning import TrialEvent, run_trials
from cluster.tuning_trials import Race
from csm import storage
from csm.datasets.digits import digits_hard
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec, fit_run
from flows.progress import task

PARALLEL = 2


def tuning_overhead(trials: int = 40, seconds: float = 5.0) -> dict[str, Any]:
    """Time of trials on ``digits-hard`` through ``run_trials`` over that of as many processes that take the same runs from a list.

    The length of a training is set once, by the number of its epochs, from one that trains alone. Both sides train ``PARALLEL`` runs at
    once, one thread each, and are timed when their processes are there; what it takes to start those is stated apart: for Tune that is
    joining Ray, and its trials' processes start within its time.

    Args:
        trials: number of trainings on either side.
        seconds: of one training, alone.

    Returns:
        trials, parallel, epochs, training_s (one training alone), bare_s, tune_s, ratio (tune / bare), connect_s, identical (whether the
        weights of all runs are equal), load_before (processes that wanted to run in the minute before), cpus.
    """
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder)
        digits_hard().save(root / "data")
        probe = _specs(root, "probe", 20, 0, {})[0]
        fit_run(replace(probe, optimizer=replace(probe.optimizer, epochs=1)))  # reads the data
        started = time.monotonic()
        fit_run(replace(probe, fingerprint="timed"))
        epochs = max(1, round(20 * seconds / (time.monotonic() - started)))
        started = time.monotonic()
        fit_run(_specs(root, "alone", epochs, 0, {})[0])
        alone = time.monotonic() - started

        with task("bare processes", trials) as progress, multiprocessing.get_context("spawn").Pool(PARALLEL, _start) as pool:
            pool.map(_nothing, range(PARALLEL), chunksize=1)
            started = time.monotonic()
            for _ in pool.imap_unordered(_fit, [_specs(root, "bare", epochs, number, {})[0] for number in range(trials)]):
                progress.advance()
            bare = time.monotonic() - started

        numbers = iter(range(trials))
        failed = []

        def ask() -> tuple[int, dict[str, Any]] | None:
            number = next(numbers, None)
            return None if number is None else (number, {})

        started = time.monotonic()
        with task("ray tune", trials) as progress, session("local", PARALLEL):
            connected = time.monotonic()

            def on_event(event: TrialEvent) -> None:
                if event.kind == "failed":
                    failed.append(event)
                elif event.kind == "done":
                    progress.advance()

            run_trials(
                ask, partial(_specs, root, "tune", epochs), Race(epochs=epochs), Group(), 1, root / "ray", "bench", on_event
            )
            tuned = time.monotonic() - connected
        if failed:
            raise RuntimeError(f"{len(failed)} of {trials} trials failed; {failed[0].error}")
        weights = [
            [
                storage.file_digest(_specs(root, side, epochs, number, {})[0].directory / "model.safetensors")
                for side in ("bare", "tune")
            ]
            for number in range(trials)
        ]
    return {
        "trials": trials,
        "parallel": PARALLEL,
        "epochs": epochs,
        "training_s": round(alone, 2),
        "bare_s": round(bare, 2),
        "tune_s": round(tuned, 2),
        "ratio": round(tuned / bare, 3),
        "connect_s": round(connected - started, 2),
        "identical": all(first == second for first, second in weights),
        "load_before": round(load, 2),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _specs(root: Path, side: str, epochs: int, number: int, values: dict[str, Any]) -> tuple[RunSpec, ...]:
    """The run of trial ``number``, which differs from the others by its seed."""
    spec = RunSpec(
        run=f"trial-{number}",
        method="cross-entropy",
        seed=number,
        directory=root / side / f"{number:04d}",
        data=root / "data",
        network="small-cnn",
        parameters={},
        settings=Method(),
        optimizer=OptimizerConfig(epochs=epochs),
        mixed=None,
        fingerprint=storage.digest("bench", epochs, number),
    )
    return (spec,)


def _start() -> None:
    torch.set_num_threads(1)


def _nothing(number: int) -> None:
    """Returns when its process is there."""


def _fit(spec: RunSpec) -> None:
    fit_run(spec)
