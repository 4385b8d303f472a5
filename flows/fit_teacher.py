"""fit-teacher: the classifiers that annotators and pair policies ask, trained on real images alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from csm import storage
from csm.datasets import RealDataset
from csm.methods import Method
from csm.runs import RunSpec
from flows.annotators import TeacherConfig
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.folders import absolute_folders
from flows.methods import teacher_training
from flows.networks import check_training, network_settings
from flows.stages import Context, Made, Stage
from flows.training import fit_runs

TEACHER = Method(description="Member of the teacher: cross-entropy on real images")
TEACHER_SEED = 1000  # members must not be the classifiers of the comparison: those have seeds 0, 1, ...


def members(workspace: Workspace, config: Config) -> tuple[Path, ...]:
    """Folders of the teacher's classifiers."""
    return tuple(workspace.teacher_member(number).absolute() for number in range(config.annotate.members))


def _run(context: Context, record: StageRecord) -> Made:
    specs = [_member(context, number) for number in range(context.config.annotate.members)]
    fit_runs(context, specs, record.name, "annotator")
    return Made(len(specs), storage.digest(*(storage.file_digest(spec.directory / "model.safetensors") for spec in specs)))


def _member(context: Context, number: int) -> RunSpec:
    """One classifier of the teacher, trained as the comparison's cross-entropy is, or as ``annotate.teacher`` says; its seed is its own."""
    workspace, train = context.workspace, teacher_training(context.config.train, context.config.annotate)
    data = RealDataset.load_info(workspace.root)
    settings = [data.digest, train.network, network_settings(train), asdict(train.optimizer), number]
    return RunSpec(
        run=f"teacher-{number:02d}",
        method="teacher",
        seed=TEACHER_SEED + number,
        directory=workspace.teacher_member(number).absolute(),
        data=workspace.root.absolute(),
        network=train.network,
        parameters=absolute_folders(train.parameters),
        settings=TEACHER,
        optimizer=train.optimizer,
        mixed=None,
        fingerprint=storage.digest("teacher", *settings),
    )


def _settings(config: Config) -> dict[str, Any]:
    train = teacher_training(config.train, config.annotate)
    settings = {"network": train.network, "parameters": network_settings(train), "optimizer": asdict(train.optimizer)}
    return {"annotate": {"members": config.annotate.members}, "train": settings}


def _check(context: Context) -> None:
    train, annotate = context.config.train, context.config.annotate
    where = "train" if annotate.teacher == TeacherConfig() else "annotate.teacher"
    check_training(context, teacher_training(train, annotate), where)


STAGE = Stage(
    name="fit-teacher",
    unit="classifiers",
    code_version=1,
    inputs=("prepare",),
    settings=_settings,
    outputs=lambda workspace, config: [member / "run.json" for member in members(workspace, config)],
    check=_check,
    run=_run,
    incremental=True,
)
