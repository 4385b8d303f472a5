"""mix: plan -> mixed images, over Ray Data; annotation follows on its heels when the annotators are fitted."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from cluster.attempts import Standing
from cluster.ledger import finished_parts, open_ledger, part_bytes, part_name, read_receipts, spent
from cluster.mixing import MixJob, process_shards
from cluster.shards import Receipt, part_path, plan_shards
from csm import storage
from csm.datasets import RealDataset
from csm.generators import load_generator
from csm.generators.conditioning import check_spherical
from csm.generators.guidance import set_guidance
from csm.mixing import NOISED, evaluations_per_image, starting_at
from csm.planning import SEMANTIC, kind_digests, ratio_grid, shard_name
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.progress import task
from flows.reuse import stale
from flows.stages import Context, Losses, Made, Stage

TRACKED_SECONDS = 10.0  # between two points in MLflow


def _run(context: Context, record: StageRecord) -> Made:
    from flows.annotate import annotate_jobs

    workspace, config = context.workspace, context.config
    rows, keys = plan_shards(workspace.plan), mixed_keys(workspace, record)
    receipts, files = read_receipts(workspace.root), part_bytes(workspace.mixed)
    done = finished(workspace, receipts, files, "mixed", workspace.mixed, keys)
    remove_other_parts(workspace.mixed, files, rows)
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
        real=workspace.real.absolute(),
        strength=config.mix.strength,
        guidance=config.mix.guidance,
        keys=keys,
    )
    followers = annotate_jobs(context, todo) if stale(context, "fit-annotators") is None else []
    if todo:
        parts = {part_name("mixed", kind): key for kind, key in keys.items()}
        before = sum(spent(receipts, part, done) for part in parts)
        all_parts = parts | {follower.part: follower.key for follower in followers}
        work = partial(process_shards, job, followers, config.resources.mix, config.resources.annotate)
        total, made = sum(rows.values()), sum(rows[shard] for shard in done)
        process(context, record, work, all_parts, set(parts), "images", total, made, before)
    ratios = ratio_grid(config.plan).tolist()
    per_image = sum(
        evaluations_per_image(config.mix.sampler, config.mix.operator, ratios, kind, config.guidance)
        * sum(plan_shards(workspace.plan, kind).values())
        for kind in config.plan.kinds
    ) / sum(rows.values())
    context.tracker.log_metrics(f"stage {record.name} {record.fingerprint}", {"evaluations_per_image": per_image})
    return Made(sum(rows.values()), record.fingerprint)


def process(
    context: Context,
    record: StageRecord,
    work: Callable[[Callable[[Receipt], None], Callable[[Standing], None]], None],
    keys: Mapping[str, str],
    parts: Collection[str],
    unit: str,
    total: int,
    done: int,
    seconds: float = 0.0,
) -> None:
    """Do ``work``, which makes the parts of ``keys``, each under its key, over Ray, and keep each receipt in the ledger as it comes.

    It calls the functions that it is given: the first with every receipt, the other now and then with what the workers are at.

    Progress, on the terminal and in MLflow, is that of ``parts``: how many of ``total`` rows, which are called ``unit`` (``done`` were
    there before), how many a second of this session, and device-seconds: how long the workers were busy, ``seconds`` of them in sessions
    before.
    """
    context.connect()
    tracker, logged, before = context.tracker, 0.0, context.losses.get(record.name, Losses())
    with task(record.name, total, done) as progress, open_ledger(context.workspace.root, keys) as note:

        def report() -> None:
            values = {unit: float(progress.done), f"{unit}_per_s": progress.rate, "device_seconds": seconds}
            tracker.log_steps(f"stage {record.name} {record.fingerprint}", [(progress.done, values)])

        def on_receipt(receipt: Receipt) -> None:
            nonlocal seconds, logged
            note(receipt)
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
    return f"slowest: {shard_name(shard)} on {host}, {seconds:.0f} s"


def remove_other_parts(directory: Path, files: Collection[str], rows: Collection[int]) -> None:
    """Remove those of the part files ``files`` whose shards the plan does not have, so that a reader may take every file of the folder."""
    for name in set(files) - {part_path(Path(), shard).name for shard in rows}:  # a path on a store takes ten times as long
        (directory / name).unlink(missing_ok=True)


def _check(context: Context) -> None:
    """The generator must know the operator, guidance, and the noise level of images that start from real ones: seen once it is there."""
    config, workspace = context.config, context.workspace
    is_spherical, is_noised = config.mix.operator == "slerp", NOISED in config.plan.kinds
    awaited = "generator" in context.forced and "generator" not in context.outcomes
    if not (is_spherical or is_noised or config.guidance != 1) or awaited or stale(context, "generator") is not None:
        return
    generator = load_generator(workspace.generator)
    if is_spherical:
        check_spherical(generator)
    set_guidance(generator, config.guidance)
    if is_noised:
        starting_at(config.mix.strength, config.mix.sampler, generator, RealDataset.load_info(workspace.root).shape)


def _settings(config: Config) -> dict[str, Any]:
    """Those that the images depend on."""
    without = {"strength"} if NOISED not in config.plan.kinds else set()
    if config.guidance == config.own_guidance:  # which images of the generator have anyway
        without.add("guidance")
    return {"mix": {name: value for name, value in asdict(config.mix).items() if name not in without}}


def _grows(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether at most kinds are added that need a ``strength``."""
    return {**after["mix"], **before["mix"]} == after["mix"] and set(after["mix"]) - set(before["mix"]) <= {"strength"}


def mixed_keys(workspace: Workspace, record: StageRecord) -> dict[str, str]:
    """Kind -> key of its part files under ``record`` of the stage: of all that its images depend on, whatever else is planned.

    That of semantic mixtures is the fingerprint which the record has if there are no other kinds.
    """
    keys = {}
    for kind, digest in (kind_digests(workspace.plan) or {SEMANTIC: record.inputs["plan"]}).items():
        mix = {name: value for name, value in record.settings["mix"].items() if name != "strength" or kind == NOISED}
        keys[kind] = storage.digest(record.name, record.code_version, {"mix": mix}, {**record.inputs, "plan": digest})
    return keys


def finished(
    workspace: Workspace, receipts: pl.DataFrame, files: Mapping[str, int], part: str, directory: Path, keys: Mapping[str, str]
) -> set[int]:
    """``finished_parts`` of the shards of every kind of ``keys``, each under its key."""
    found = set[int]()
    for kind, key in keys.items():
        rows = plan_shards(workspace.plan, kind)
        found |= finished_parts(receipts, files, part_name(part, kind), directory, key, rows)
    return found


def missing_part(workspace: Workspace, part: str, directory: Path, keys: Mapping[str, str]) -> Path | None:
    """The first part file that the plan asks for and that is not there as it should be; None if all are."""
    done = finished(workspace, read_receipts(workspace.root), part_bytes(directory), part, directory, keys)
    return next((part_path(directory, shard) for shard in plan_shards(workspace.plan) if shard not in done), None)


def _missing(context: Context, record: StageRecord) -> Path | None:
    workspace = context.workspace
    return missing_part(workspace, "mixed", workspace.mixed, mixed_keys(workspace, record))


def _keeps(context: Context, wanted: StageRecord) -> bool:
    """Whether every image that is there is one of those that are wanted: other kinds may be made beside it."""
    workspace, files = context.workspace, part_bytes(context.workspace.mixed)
    keys = mixed_keys(workspace, wanted)
    done = finished(workspace, read_receipts(workspace.root), files, "mixed", workspace.mixed, keys)
    return set(files) <= {part_path(Path(), shard).name for shard in done}


STAGE = Stage(
    name="mix",
    code_version=2,
    inputs=("prepare", "generator", "plan"),
    settings=_settings,
    outputs=lambda workspace, config: [workspace.mixed],
    missing=_missing,
    check=_check,
    run=_run,
    costly=True,
    grows=_grows,
    keeps=_keeps,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
