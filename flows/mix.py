"""mix: plan -> mixed images, over Ray Data; annotation follows on its heels when the annotators are fitted."""

import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TextIO

from cluster.attempts import Standing
from cluster.mixing import MixJob, process_shards
from cluster.shards import Receipt, finished_shards, part_path, plan_shards
from csm.datasets import RealDataset
from csm.generators import load_generator
from csm.generators.conditioning import check_spherical
from csm.mixing import evaluations_per_image
from csm.planning import ratio_grid
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.progress import task
from flows.stages import Context, Losses, Made, Stage, stale

RECEIPTS = "receipts.jsonl"
TRACKED_SECONDS = 10.0  # between two points in MLflow


def _run(context: Context, record: StageRecord) -> Made:
    from flows.annotate import annotate_jobs

    workspace, config = context.workspace, context.config
    rows = plan_shards(workspace.plan)
    done = finished_shards(workspace.mixed, record.fingerprint, rows)
    remove_other_parts(workspace.mixed, rows)
    todo = frozenset(rows) - done
    job = MixJob(
        plan=workspace.plan.absolute(),
        generator=workspace.generator.absolute(),
        mixed=workspace.mixed.absolute(),
        key=record.fingerprint,
        shape=RealDataset.load_info(workspace.root).shape,
        sampler=config.mix.sampler,
        batch_size=config.mix.batch_size,
        shards=todo,
        operator=config.mix.operator,
        device="cuda" if config.resources.mix.gpus else "cpu",
        precision=config.mix.precision,
        compiled=config.mix.compile,
    )
    followers = annotate_jobs(context, record.fingerprint, todo) if stale(context, "fit-annotators") is None else []
    if todo:
        before = spent(workspace.root / RECEIPTS, "mixed", done)
        work = partial(process_shards, job, followers, config.resources.mix, config.resources.annotate)
        process(context, record, work, {"mixed"}, "images", sum(rows.values()), sum(rows[shard] for shard in done), before)
    per_image = evaluations_per_image(config.mix.sampler, config.mix.operator, ratio_grid(config.plan).tolist())
    context.tracker.log_metrics(f"stage {record.name} {record.fingerprint}", {"evaluations_per_image": per_image})
    return Made(sum(rows.values()), record.fingerprint)


def process(
    context: Context,
    record: StageRecord,
    work: Callable[[Callable[[Receipt], None], Callable[[Standing], None]], None],
    parts: Collection[str],
    unit: str,
    total: int,
    done: int,
    seconds: float = 0.0,
) -> None:
    """Do ``work`` over Ray, and keep each receipt in ``receipts.jsonl`` as it comes.

    It calls the functions that it is given: the first with every receipt, the other now and then with what the workers are at.

    Progress, on the terminal and in MLflow, is that of ``parts``: how many of ``total`` rows, which are called ``unit`` (``done`` were
    there before), how many a second of this session, and device-seconds: how long the workers were busy, ``seconds`` of them in sessions
    before.
    """
    context.connect()
    tracker, logged, before = context.tracker, 0.0, context.losses.get(record.name, Losses())
    with task(record.name, total, done) as progress, _open_log(context.workspace.root / RECEIPTS) as log:

        def report() -> None:
            values = {unit: float(progress.done), f"{unit}_per_s": progress.rate, "device_seconds": seconds}
            tracker.log_steps(f"stage {record.name} {record.fingerprint}", [(progress.done, values)])

        def on_receipt(receipt: Receipt) -> None:
            nonlocal seconds, logged
            log.write(json.dumps(asdict(receipt)) + "\n")
            log.flush()
            if receipt.part not in parts:
                return
            seconds += receipt.seconds
            rate = (progress.made + receipt.rows) / progress.seconds
            progress.advance(receipt.rows, f"{rate:,.1f} {unit}/s  {seconds:,.1f} device-s")
            if progress.seconds - logged >= TRACKED_SECONDS:
                logged = progress.seconds
                report()

        def on_standing(standing: Standing) -> None:
            progress.warn(trouble(standing))
            context.losses[record.name] = Losses(before.workers + standing.lost, before.seconds + standing.seconds)

        work(on_receipt, on_standing)
        report()


def trouble(standing: Standing) -> str:
    """What holds the workers up, for the user; "" if nothing does."""
    if standing.wanting:
        return f"waiting: {standing.wanting}"
    if standing.slowest is None:
        return ""
    _, shard, host, seconds = standing.slowest
    return f"slowest: shard {shard} on {host}, {seconds:.0f} s"


def _open_log(path: Path) -> TextIO:
    """The receipts, to append to. Half a line, as a kill or a full disk leaves it, is cut off."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def spent(log: Path, part: str, shards: Collection[int]) -> float:
    """Device-seconds of the last receipt in ``log`` for each of ``shards`` of ``part``."""
    seconds: dict[int, float] = {}
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []  # the last one is empty or cut short
    for line in lines:
        receipt = Receipt(**json.loads(line))
        if receipt.part == part and receipt.shard in shards:
            seconds[receipt.shard] = receipt.seconds
    return sum(seconds.values())


def remove_other_parts(directory: Path, rows: dict[int, int]) -> None:
    """Remove part files of shards that the plan does not have, so that a reader may take every file of the folder."""
    if directory.is_dir():
        wanted = {part_path(directory, shard).name for shard in rows}
        for path in directory.glob("part-*.parquet"):
            if path.name not in wanted:
                path.unlink()


def _check(context: Context) -> None:
    """The generator must know the operator, which is known once it is there."""
    if context.config.mix.operator == "slerp" and (context.workspace.generator / "generator.json").is_file():
        check_spherical(load_generator(context.workspace.generator))


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    return [part_path(workspace.mixed, shard) for shard in plan_shards(workspace.plan)] if workspace.plan.is_file() else []


STAGE = Stage(
    name="mix",
    code_version=2,
    inputs=("prepare", "generator", "plan"),
    settings=lambda config: {"mix": asdict(config.mix)},
    outputs=_outputs,
    check=_check,
    run=_run,
    costly=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
