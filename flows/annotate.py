"""annotate: every mixed image gets its confidence, by every annotator that is run."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.annotation import AnnotateJob
from cluster.ledger import finished_parts, part_bytes, read_receipts
from cluster.mixing import process_shards
from cluster.shards import plan_shards
from csm import storage
from csm.datasets import RealDataset
from csm.planning import SEMANTIC
from csm.reannotation import stored_classes
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.features import device, encoder_spec
from flows.fit_annotators import annotator_spec, annotators, calibration_of, fit_fingerprint
from flows.label_digests import label_digest
from flows.mix import missing_part, mixed_keys, process, remove_other_parts
from flows.reuse import stale
from flows.stages import Context, Made, Stage


def _run(context: Context, record: StageRecord) -> Made:
    workspace, resources = context.workspace, context.config.resources
    rows = plan_shards(workspace.plan)
    jobs = annotate_jobs(context, frozenset(rows))
    names = annotators(workspace, context.config)
    total = sum(rows.values()) * len(names)
    todo = [job for job in jobs if job.shards]
    if todo:
        work = partial(process_shards, None, todo, resources.mix, resources.annotate)
        done = total - sum(rows[shard] for job in todo for shard in job.shards)
        process(
            context, record, work, {job.part: job.key for job in todo}, {job.part for job in todo}, "annotations", total, done
        )
    return Made(total, storage.digest({job.part: annotated(workspace, context.config, job.name, job.kind) for job in jobs}))


def annotate_jobs(context: Context, shards: frozenset[int]) -> list[AnnotateJob]:
    """Jobs for each annotator and kind of images: those of ``shards`` that it has not annotated since they were mixed.

    Part files of shards that the plan does not have are removed.
    """
    workspace, config = context.workspace, context.config
    info = RealDataset.load_info(workspace.root)
    receipts, jobs = read_receipts(workspace.root), []
    rows = {kind: plan_shards(workspace.plan, kind) for kind in _mixed_keys(workspace)}
    planned = frozenset[int]().union(*rows.values())
    for name in annotators(workspace, config):
        spec = annotator_spec(workspace, config, name)
        job = AnnotateJob(
            name=name,
            spec=spec,
            encoders={encoder: encoder_spec(workspace, config, encoder) for encoder in sorted(spec.encoders)},
            plan=workspace.plan.absolute(),
            mixed=workspace.mixed.absolute(),
            annotations=workspace.annotations(name).absolute(),
            key="",
            shape=info.shape,
            n_classes=info.n_classes,
            shards=shards,
            device=device(config),
            top=stored_classes(info.n_classes, config.annotate.top),
        )
        files = part_bytes(job.annotations)
        remove_other_parts(job.annotations, files, planned)
        for kind, key in _keys(workspace, config, name).items():
            of_kind = replace(job, kind=kind, key=key)
            done = finished_parts(receipts, files, of_kind.part, job.annotations, key, rows[kind])
            jobs.append(replace(of_kind, shards=(shards & rows[kind].keys()) - done))
    return jobs


def annotated(workspace: Workspace, config: Config, name: str, kind: str = SEMANTIC) -> str:
    """Identifies the soft labels of the images of ``kind`` by the annotator ``name``."""
    return label_digest(_keys(workspace, config, name).get(kind, ""), calibration_of(workspace, name))


def _mixed_keys(workspace: Workspace) -> dict[str, str]:
    """Kind -> key of its part files, as they were mixed."""
    record = workspace.record("mix")
    return mixed_keys(workspace, record) if record else {}


def _keys(workspace: Workspace, config: Config, name: str) -> dict[str, str]:
    """Kind -> key of what ``name`` says of its images."""
    return {kind: _key(workspace, config, name, key) for kind, key in _mixed_keys(workspace).items()}


def _key(workspace: Workspace, config: Config, name: str, mixed: str) -> str:
    """Identifies what ``name`` says, before calibration, of the images that were mixed under the key ``mixed``."""
    top = stored_classes(RealDataset.load_info(workspace.root).n_classes, config.annotate.top)
    return storage.digest(mixed, fit_fingerprint(workspace, name), *([] if top is None else [top]))


def _check_top(context: Context) -> None:
    """``annotate.top`` against the number of classes, as soon as the data are those that are asked for."""
    if stale(context, "prepare") is None:
        stored_classes(RealDataset.load_info(context.workspace.root).n_classes, context.config.annotate.top)


def _settings(config: Config) -> dict[str, Any]:
    """``top`` where it is set: by default it is nothing new."""
    top = config.annotate.top
    return {"annotators": list(config.annotators), **({} if top is None else {"annotate": {"top": top}})}


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    return [workspace.annotations(name) for name in annotators(workspace, config)]


def _missing(context: Context, record: StageRecord) -> Path | None:
    workspace = context.workspace
    names = annotators(workspace, context.config)
    missing = (
        missing_part(workspace, name, workspace.annotations(name), _keys(workspace, context.config, name)) for name in names
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
    check=_check_top,
    check_early=_check_top,
    run=_run,
    incremental=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
