"""mix: plan -> mixed images, over Ray Data; annotation follows on its heels when the annotators are fitted."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.mixing import AnnotateJob, MixJob, process_shards
from cluster.shards import Receipt, finished_shards, part_path, plan_shards
from csm.datasets import RealDataset
from csm.mixing import evaluations_per_image
from csm.planning import ratio_grid
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.progress import task
from flows.stages import Context, Made, Stage, stale


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
    )
    followers = annotate_jobs(context, record.fingerprint, todo) if stale(context, "fit-annotators") is None else []
    receipts = process(context, job if todo else None, followers, "mix", sum(rows.values()), sum(rows[shard] for shard in done))
    mixed = [receipt for receipt in receipts if receipt.part == "mixed"]
    if mixed:
        seconds = sum(receipt.seconds for receipt in mixed)
        images = sum(receipt.rows for receipt in mixed)
        key = f"stage {record.name} {record.fingerprint}"
        measured = {"images": float(images), "device_seconds": seconds, "images_per_device_second": images / seconds}
        ratios = ratio_grid(config.plan).tolist()
        measured["evaluations_per_image"] = evaluations_per_image(config.mix.sampler, config.mix.operator, ratios)
        context.tracker.log_metrics(key, measured)
    return Made(sum(rows.values()), record.fingerprint)


def process(
    context: Context, job: MixJob | None, followers: Sequence[AnnotateJob], name: str, total: int, done: int
) -> list[Receipt]:
    """Run shards over Ray with progress on part ``name``, and keep every receipt in ``receipts.jsonl`` as it comes."""
    receipts: list[Receipt] = []
    if job is None and not any(follower.shards for follower in followers):
        return receipts
    context.connect()
    resources = context.config.resources
    started = time.monotonic()
    counted = "mixed" if job else followers[0].name
    with task(name, total) as progress, (context.workspace.root / "receipts.jsonl").open("a", encoding="utf-8") as log:
        progress.advance(done)

        def on_receipt(receipt: Receipt) -> None:
            receipts.append(receipt)
            log.write(json.dumps(asdict(receipt)) + "\n")
            log.flush()
            if receipt.part == counted:
                rate = (progress.done + receipt.rows - done) / (time.monotonic() - started)
                progress.advance(receipt.rows, f"{rate:.3g} images/s")

        process_shards(job, followers, resources.mix, resources.annotate, on_receipt)
    return receipts


def remove_other_parts(directory: Path, rows: dict[int, int]) -> None:
    """Remove part files of shards that the plan does not have, so that a reader may take every file of the folder."""
    if directory.is_dir():
        wanted = {part_path(directory, shard).name for shard in rows}
        for path in directory.glob("part-*.parquet"):
            if path.name not in wanted:
                path.unlink()


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    return [part_path(workspace.mixed, shard) for shard in plan_shards(workspace.plan)] if workspace.plan.is_file() else []


STAGE = Stage(
    name="mix",
    code_version=2,
    inputs=("prepare", "generator", "plan"),
    settings=lambda config: {"mix": asdict(config.mix)},
    outputs=_outputs,
    run=_run,
    costly=True,
)
