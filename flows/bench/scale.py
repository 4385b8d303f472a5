"""bench scale: what more actors give, and what a plan of millions of rows costs before its first image: to make, to list, to go on with."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.table import Table

from cluster.ledger import LOG, finished_parts, open_ledger, part_bytes, read_receipts
from cluster.shards import KEY, ROWS, Receipt, part_path, plan_shards, read_plan
from csm import tables
from flows.annotate import annotate_jobs
from flows.artifacts import StageRecord, Workspace, open_workspace
from flows.bench.actors import CASES, actor_speed
from flows.bench.clock import in_a_process, peak_mib
from flows.config import Config, load_config
from flows.progress import say
from flows.reuse import run_stages, stale
from flows.run import STAGES
from flows.stages import Context, Made

SHARD_ROWS, RATIOS, PAIRS = 1000, 8, 45
LEFT = 4  # shards that a run which goes on still has to do
FOOTERS = 2_000  # shards, at most, of which also a run without receipts is measured: it reads each footer
SETTINGS = (
    *(
        f"data.{setting}"
        for setting in ("base=synthetic", "height=4", "width=4", "mean_scale=1.0", "train=1000", "val=200", "test=200")
    ),
    *(f"plan.shard_rows={SHARD_ROWS}", f"plan.ratios={RATIOS}", "mix.sampler.steps=2"),
    *("train.compare=[csm-ratio]", "annotate.annotator=qda-pixels"),
)
GIB_ROWS, MINUTES_ROWS, DISK_ROWS = 60e6, 12e6, 140e6  # rows, about, of a GiB of memory, of a minute, of a GiB on the disk
POLL_SECONDS = 0.02


def scale(
    rows: Sequence[int] = (1_000_000, 10_000_000), actors: Sequence[int] = (1, 2, 4), seconds: float = 20.0
) -> dict[str, Any]:
    """Mixing by more and more actors (``csm.bench.actors``), and the cost of plans of more and more ``rows``.

    Returns:
        cores; actors (rows of ``actor_speed`` for each of its cases); plans (``plan_costs`` of each of ``rows``).
    """
    speeds = [row for case in CASES for row in actor_speed(case, actors, seconds)] if actors else []
    return {"cores": len(os.sched_getaffinity(0)), "actors": speeds, "plans": [plan_costs(number) for number in rows]}


def plan_costs(rows: int) -> dict[str, Any]:
    """What a plan of at least ``rows`` rows costs, in a real workspace of class-conditional Gaussians with two annotators.

    Part files are empty and have synthetic receipts of that length; those of the last ``LEFT`` shards are not there. Steps are measured one
    by one, each in a process of its own, whose peak memory holds the imports too; "first" and "resume" are `csm mix` as a user types it,
    from the start of the command until the ledger has the first receipt: with everything to do, and with all but ``LEFT`` finished.

    Returns:
        rows, shards, parts (files of images and annotations), imports_mib; then step -> seconds and mib: plan (stage: made and written),
        plan_shards, read (of one shard, by a worker), first, listing (``part_bytes`` of the images), receipts
        (``read_receipts``, of all parts), finished (``finished_parts`` of the images), resume, stale (of stage mix), footers
        (``finished_parts`` without a receipt; only of small plans).
    """
    say(
        f"{rows:,} rows: about {1 + rows / MINUTES_ROWS:.0f} minutes, {1 + rows / GIB_ROWS:.1f} GiB of memory, and "
        f"{rows / DISK_ROWS:.1f} GiB and {3 * rows / SHARD_ROWS:,.0f} files below {tempfile.gettempdir()}"
    )
    sets = -(-rows // (PAIRS * RATIOS))
    settings = (*SETTINGS, f"plan.sets_per_pair={sets}")
    with tempfile.TemporaryDirectory(prefix="csm-bench-") as folder:
        root = Path(folder) / "workspace"
        in_a_process(_stages, root, settings, ("prepare", "generator", "fit-annotators"))
        steps = {"plan": in_a_process(_timed, _stages, root, settings, ("plan",))}
        steps["plan_shards"] = in_a_process(_timed, _shards, root)
        steps["read"] = in_a_process(_timed, _read, root)
        steps["first"] = _first_receipt(root, settings, stop=True)
        shards, parts = in_a_process(_fill, root, settings)
        steps["listing"] = in_a_process(_timed, _listing, root)
        steps["receipts"] = in_a_process(_timed, read_receipts, root)
        steps["finished"] = in_a_process(_finished, root, settings)
        steps["resume"] = _first_receipt(root, settings)
        steps["stale"] = in_a_process(_timed, _stale, root, settings)
        if shards <= FOOTERS:
            steps["footers"] = in_a_process(_footers, root)
        return {
            "rows": PAIRS * RATIOS * sets,
            "shards": shards,
            "parts": parts,
            "imports_mib": in_a_process(peak_mib),
            **steps,
        }


def speeds_table(speeds: Sequence[dict[str, Any]]) -> Table:
    """A row for each case and number of actors."""
    shown = Table("case", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("actors", "images/s", "efficiency", "shards/s", "driver % of a core", "driver ms/shard"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in speeds:
        values = (f"{row['images_per_s']:,.1f}", f"{row['efficiency']:.2f}", f"{row['shards_per_s']:.1f}")
        shown.add_row(row["case"], str(row["actors"]), *values, f"{100 * row['driver_share']:.1f}", f"{row['driver_ms']:.1f}")
    return shown


def plans_table(plans: Sequence[dict[str, Any]]) -> Table:
    """Seconds and peak memory of every step, a column for each plan."""
    shown = Table("step", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for plan in plans:
        shown.add_column(f"{plan['shards']:,} shards", justify="right", no_wrap=True)
    for step in dict.fromkeys(name for plan in plans for name, value in plan.items() if isinstance(value, dict)):
        cells = [plan.get(step) for plan in plans]
        shown.add_row(step, *("" if cell is None else f"{cell['seconds']:.2f} s {cell['mib']:,} MiB" for cell in cells))
    return shown


def _config(settings: Sequence[str]) -> Config:
    return load_config("gaussians", list(settings))


def _cost(started: float) -> dict[str, Any]:
    return {"seconds": round(time.monotonic() - started, 3), "mib": peak_mib()}


def _timed(function: Callable[..., object], *arguments: object) -> dict[str, Any]:
    started = time.monotonic()
    function(*arguments)
    return _cost(started)


def _stages(root: Path, settings: Sequence[str], names: Sequence[str]) -> None:
    config = _config(settings)
    with open_workspace(root) as workspace, Context(config, workspace, STAGES) as context:
        run_stages(context, names)


def _shards(root: Path) -> None:
    plan_shards(Workspace(root).plan)


def _read(root: Path) -> None:
    read_plan(Workspace(root).plan, 0)


def _listing(root: Path) -> None:
    part_bytes(Workspace(root).mixed)


def _finished(root: Path, settings: Sequence[str]) -> dict[str, Any]:
    workspace = Workspace(root)
    record, rows, receipts, files = (
        workspace.record("mix"), plan_shards(workspace.plan), read_receipts(root), part_bytes(workspace.mixed),
    )  # fmt: skip
    assert record is not None
    started = time.monotonic()
    done = finished_parts(receipts, files, "mixed", workspace.mixed, record.fingerprint, rows)
    cost = _cost(started)
    _require(len(rows) - len(done) == LEFT, f"{len(done)} of {len(rows)} shards are finished")
    return cost


def _stale(root: Path, settings: Sequence[str]) -> None:
    with open_workspace(root) as workspace:
        reason = stale(Context(_config(settings), workspace, STAGES), "mix")
    _require(reason is None, f"mix {reason}")


class _InterruptedError(Exception):
    """The stage ends in the middle, as by a kill."""


def _fill(root: Path, settings: Sequence[str]) -> tuple[int, int]:
    """Leave what a run leaves that was interrupted ``LEFT`` shards before its end; returns the numbers of shards and part files."""
    numbers = 0, 0

    def fill(context: Context, record: StageRecord) -> Made:
        nonlocal numbers
        workspace = context.workspace
        rows = plan_shards(workspace.plan)
        shards = list(rows)[:-LEFT]
        folders = {"mixed": (workspace.mixed, record.fingerprint)}
        folders |= {job.name: (job.annotations, job.key) for job in annotate_jobs(context, frozenset(rows))}
        for path in (folder for folder, _ in folders.values() if folder.is_dir()):
            shutil.rmtree(path)
        (root / LOG).unlink(missing_ok=True)
        with open_ledger(root, {}) as note:
            for part, (folder, key) in folders.items():
                folder.mkdir(parents=True)
                for shard in shards:
                    part_path(folder, shard).touch()
                    note(Receipt(part, shard, rows[shard], f"{shard:016x}", 1.5, "f" * 56, 0, key))
        numbers = len(rows), len(shards) * len(folders)
        raise _InterruptedError

    config = _config(settings)
    stages = {**STAGES, "mix": replace(STAGES["mix"], run=fill)}
    with suppress(_InterruptedError), open_workspace(root) as workspace, Context(config, workspace, stages) as context:
        run_stages(context, ("mix",))
    return numbers


def _footers(root: Path) -> dict[str, Any]:
    """Cost of ``finished_parts`` where no shard has a receipt."""
    workspace = Workspace(root)
    rows, key = plan_shards(workspace.plan), "bench"
    shutil.rmtree(workspace.mixed)
    for shard, count in rows.items():
        part = part_path(workspace.mixed, shard)
        part.parent.mkdir(exist_ok=True)
        tables.write_file(pl.DataFrame(schema=dict(tables.MIXED)), part, {KEY: key, ROWS: str(count)})
    started = time.monotonic()
    done = finished_parts(read_receipts(root).clear(), part_bytes(workspace.mixed), "mixed", workspace.mixed, key, rows)
    cost = _cost(started)
    _require(len(done) == len(rows), f"{len(done)} of {len(rows)} shards are finished by their footers")
    return cost


def _first_receipt(root: Path, settings: Sequence[str], stop: bool = False) -> dict[str, Any]:
    """Cost of `csm mix` until its first receipt is in the ledger; then it is stopped, or finishes."""
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "flows.cli", "mix", "--config", "gaussians", *sets, "--workspace", str(root)]
    ledger = root / LOG
    before, started = _bytes(ledger), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and _bytes(ledger) <= before:
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    mib = peak_mib(process.pid) if process.poll() is None else 0
    if stop:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    _require(_bytes(ledger) > before and process.returncode == (130 if stop else 0), said)
    return {"seconds": round(seconds, 3), "mib": mib}


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _require(right: bool, what: str) -> None:
    if not right:
        raise RuntimeError(what)
