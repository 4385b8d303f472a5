"""annotate: every mixed image gets its confidence, by every annotator that is run."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.annotation import AnnotateJob
from cluster.ledger import finished_parts, part_bytes, read_receipts
from cluster.mixing import process_shards
from cluster.shards import plan_shards
from csm import storage
from csm.datasets import RealDataset
from csm.reannotation import stored_classes
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.features import device, encoder_spec
from flows.fit_annotators import annotator_spec, annotators, calibration_of, fit_fingerprint
from flows.mix import missing_part, process, remove_other_parts
from flows.stages import Context, Made, Stage


def _run(context: Context, record: StageRecord) -> Made:
    workspace, resources = context.workspace, context.config.resources
    rows = plan_shards(workspace.plan)
    jobs = annotate_jobs(context, record.inputs["mix"], frozenset(rows))
    total = sum(rows.values()) * len(jobs)
    todo = [job for job in jobs if job.shards]
    if todo:
        work = partial(process_shards, None, todo, resources.mix, resources.annotate)
        done = total - sum(rows[shard] for job in todo for shard in job.shards)
        process(
            context, record, work, {job.name: job.key for job in todo}, {job.name for job in todo}, "annotations", total, done
        )
    return Made(total, storage.digest({job.name: annotated(workspace, context.config, job.name) for job in jobs}))


def annotate_jobs(context: Context, mixed: str, shards: frozenset[int]) -> list[AnnotateJob]:
    """One job for each annotator: those of ``shards`` that it has not annotated since they were mixed under fingerprint ``mixed``.

    Part files of shards that the plan does not have are removed.
    """
    workspace, config = context.workspace, context.config
    info = RealDataset.load_info(workspace.root)
    rows, receipts = plan_shards(workspace.plan), read_receipts(workspace.root)
    jobs = []
    for name in annotators(workspace, config):
        spec = annotator_spec(workspace, config, name)
        job = AnnotateJob(
            name=name,
            spec=spec,
            encoders={encoder: encoder_spec(workspace, config, encoder) for encoder in sorted(spec.encoders)},
            plan=workspace.plan.absolute(),
            mixed=workspace.mixed.absolute(),
            annotations=workspace.annotations(name).absolute(),
            key=_key(workspace, config, name, mixed),
            shape=info.shape,
            n_classes=info.n_classes,
            shards=shards,
            device=device(config),
            top=stored_classes(info.n_classes, config.annotate.top),
        )
        files = part_bytes(job.annotations)
        remove_other_parts(job.annotations, files, rows)
        jobs.append(replace(job, shards=shards - finished_parts(receipts, files, name, job.annotations, job.key, rows)))
    return jobs


def annotated(workspace: Workspace, config: Config, name: str) -> str:
    """Identifies the soft labels of the mixed images by the annotator ``name``."""
    mixed = workspace.record("mix")
    return storage.digest(_key(workspace, config, name, mixed.digest if mixed else ""), asdict(calibration_of(workspace, name)))


def _key(workspace: Workspace, config: Config, name: str, mixed: str) -> str:
    """Identifies what ``name`` says, before calibration, of the images that were mixed under fingerprint ``mixed``."""
    top = stored_classes(RealDataset.load_info(workspace.root).n_classes, config.annotate.top)
    return storage.digest(mixed, fit_fingerprint(workspace, name), *([] if top is None else [top]))


def _settings(config: Config) -> dict[str, Any]:
    """``top`` where it is set: by default it is nothing new."""
    top = config.annotate.top
    return {"annotators": list(config.annotators), **({} if top is None else {"annotate": {"top": top}})}


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    return [workspace.annotations(name) for name in annotators(workspace, config)]


def _missing(context: Context, record: StageRecord) -> Path | None:
    workspace, mixed = context.workspace, record.inputs["mix"]
    names = annotators(workspace, context.config)
    missing = (
        missing_part(workspace, name, workspace.annotations(name), _key(workspace, context.config, name, mixed)) for name in names
    )
    return next((path for path in missing if path), None)


STAGE = Stage(
    name="annotate",
    unit="annotations",
    code_version=2,
    inputs=("prepare", "plan", "mix", "fit-annotators"),
    settings=_settings,
    outputs=_outputs,
    missing=_missing,
    run=_run,
    incremental=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
