"""annotate: fit the annotators on real images, then give every mixed image its confidence."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.mixing import AnnotateJob
from cluster.shards import finished_shards, part_path, plan_shards
from csm import storage
from csm.datasets import RealDataset
from csm.reannotation import ANNOTATORS, Calibration, fit_calibration
from csm.runs import RunSpec
from csm.training import Method
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.mix import process, remove_other_parts
from flows.progress import say
from flows.stages import Context, Made, Stage
from flows.train import fit_runs

TEACHER = Method(description="Member of the teacher: cross-entropy on real images")
TEACHER_SEED = 1000  # members must not be the classifiers of the comparison: those have seeds 0, 1, ...


def _fit(context: Context, record: StageRecord) -> Made:
    workspace, config = context.workspace, context.config
    specs = [_member(context, number) for number in range(config.annotate.members)]
    fit_runs(context, specs, "fit-annotators", "annotator")
    data = RealDataset.load(workspace.root)
    images, labels = data.split("train")
    held_out, truth = data.split("val")
    members = _members(workspace, config)
    digests = [storage.file_digest(member / "model.safetensors") for member in members]
    for name in config.annotate.annotators:
        directory = workspace.annotator(name)
        annotator = ANNOTATORS[name].fit(directory, members, images, labels, data.info.n_classes)
        calibration = fit_calibration(annotator.log_posterior(held_out), truth, config.annotate.scale)
        storage.write_json(directory / "calibration.json", asdict(calibration))
        digests.append(storage.digest(asdict(calibration)))
        _report_calibration(context, record, name, calibration)
    return Made(len(config.annotate.annotators), storage.digest(*digests))


def _annotate(context: Context, record: StageRecord) -> Made:
    rows = plan_shards(context.workspace.plan)
    jobs = annotate_jobs(context, record.inputs["mix"], frozenset(rows))
    for job in jobs:
        remove_other_parts(job.annotations, rows)
    total = sum(rows.values()) * len(jobs)
    todo = sum(rows[shard] for job in jobs for shard in job.shards)
    if todo:
        process(context, record, None, [job for job in jobs if job.shards], total, total - todo)
    return Made(total, record.fingerprint)


def annotate_jobs(context: Context, mixed: str, shards: frozenset[int]) -> list[AnnotateJob]:
    """One job for each annotator: those of ``shards`` that it has not annotated since they were mixed under fingerprint ``mixed``."""
    workspace, config = context.workspace, context.config
    fitted = workspace.record("fit-annotators")
    info = RealDataset.load_info(workspace.root)
    rows = plan_shards(workspace.plan)
    jobs = []
    for name in config.annotate.annotators:
        job = AnnotateJob(
            name=name,
            plan=workspace.plan.absolute(),
            mixed=workspace.mixed.absolute(),
            fitted=workspace.annotator(name).absolute(),
            members=tuple(_members(workspace, config)),
            annotations=workspace.annotations(name).absolute(),
            key=storage.digest(mixed, fitted.digest if fitted else "", name),
            shape=info.shape,
            n_classes=info.n_classes,
            shards=shards,
        )
        jobs.append(replace(job, shards=shards - finished_shards(job.annotations, job.key, rows)))
    return jobs


def _member(context: Context, number: int) -> RunSpec:
    """One classifier of the teacher, trained as the comparison's cross-entropy is, with a seed of its own."""
    workspace, train = context.workspace, context.config.train
    data = RealDataset.load_info(workspace.root)
    settings = [data.digest, train.network, train.parameters, asdict(train.optimizer), number]
    return RunSpec(
        run=f"teacher-{number:02d}",
        method="teacher",
        seed=TEACHER_SEED + number,
        directory=workspace.teacher_member(number).absolute(),
        data=workspace.root.absolute(),
        network=train.network,
        parameters=train.parameters,
        settings=TEACHER,
        optimizer=train.optimizer,
        mixed=None,
        fingerprint=storage.digest("teacher", *settings),
    )


def _members(workspace: Workspace, config: Config) -> list[Path]:
    return [workspace.teacher_member(number).absolute() for number in range(config.annotate.members)]


def _report_calibration(context: Context, record: StageRecord, name: str, calibration: Calibration) -> None:
    if calibration.temperature is None:
        say(f"  {name}: pair label with s = {calibration.scale:g}")
        return
    nll = f"NLL {calibration.nll_before:.3f} -> {calibration.nll_after:.3f} on {calibration.images} validation images"
    say(f"  {name}: temperature {calibration.temperature:.3f}, {nll}")
    values = {"temperature": calibration.temperature, "nll_before": calibration.nll_before, "nll_after": calibration.nll_after}
    measured = {f"{name}.{key}": value for key, value in values.items() if value is not None}
    context.tracker.log_metrics(f"stage {record.name} {record.fingerprint}", measured)


def _fit_settings(config: Config) -> dict[str, Any]:
    train = {"network": config.train.network, "parameters": config.train.parameters, "optimizer": asdict(config.train.optimizer)}
    return {"annotate": asdict(config.annotate), "train": train}


FIT_STAGE = Stage(
    name="fit-annotators",
    unit="annotators",
    code_version=1,
    inputs=("prepare",),
    settings=_fit_settings,
    outputs=lambda workspace, config: [workspace.annotator(name) / "calibration.json" for name in config.annotate.annotators],
    run=_fit,
    incremental=True,
)
STAGE = Stage(
    name="annotate",
    unit="annotations",
    code_version=1,
    inputs=("prepare", "plan", "mix", "fit-annotators"),
    settings=lambda config: {"annotators": list(config.annotate.annotators)},
    outputs=lambda workspace, config: [
        part_path(workspace.annotations(name), shard)
        for name in config.annotate.annotators
        for shard in (plan_shards(workspace.plan) if workspace.plan.is_file() else [])
    ],
    run=_annotate,
    incremental=True,
)
