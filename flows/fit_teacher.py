"""fit-teacher: the classifiers that annotators and pair policies ask, trained on real images alone, or taken from elsewhere."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from csm import storage
from csm.datasets import RealDataset
from csm.methods import Method
from csm.runs import RunSpec
from flows.artifacts import StageRecord, Workspace
from flows.config import Config, plain
from flows.folders import absolute_folders
from flows.methods import teacher_training
from flows.networks import check_training, network_settings
from flows.reuse import stale
from flows.stages import Context, Made, Stage
from flows.teacher_models import FILES, changed_models, check_models, find_models, take_models, taken_models
from flows.training import fit_runs

TEACHER = Method(description="Member of the teacher: cross-entropy on real images")
TEACHER_SEED = 1000  # members must not be the classifiers of the comparison: those have seeds 0, 1, ...


def members(workspace: Workspace, config: Config) -> tuple[Path, ...]:
    """Folders of the teacher's classifiers; of those that are taken from elsewhere none before they were."""
    if config.annotate.teacher.models:
        return taken_models(workspace)
    return tuple(workspace.teacher_member(number).absolute() for number in range(config.annotate.members))


def _run(context: Context, record: StageRecord) -> Made:
    if models := context.config.annotate.teacher.models:
        folders = find_models(models)
        check_models(folders, RealDataset.load_info(context.workspace.root))
        return Made(len(folders), take_models(context.workspace, folders))
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
    if models := config.annotate.teacher.models:
        return {"annotate": {"teacher": {"models": list(models)}}}
    train = teacher_training(config.train, config.annotate)
    settings = {"network": train.network, "parameters": network_settings(train), "optimizer": asdict(train.optimizer)}
    return {"annotate": {"members": config.annotate.members}, "train": settings}


def _check_early(context: Context) -> None:
    """Finished classifiers must be there before data are read for minutes; those that were taken before may be gone."""
    models, record = context.config.annotate.teacher.models, context.workspace.record("fit-teacher")
    is_taken = record is not None and record.done and record.settings == plain(_settings(context.config))
    if models and ("fit-teacher" in context.forced or not is_taken):
        find_models(models)


def _check(context: Context) -> None:
    train, annotate = context.config.train, context.config.annotate
    if annotate.teacher.models:
        if stale(context, "fit-teacher"):  # else they were copied, and may be gone
            folders = find_models(annotate.teacher.models)
            if context.workspace.dataset.is_file():
                check_models(folders, RealDataset.load_info(context.workspace.root))
        return
    of_train = annotate.teacher.network is None and annotate.teacher.parameters is None
    where = "train" if of_train else "annotate.teacher"
    check_training(context, teacher_training(train, annotate), where)


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    folders = members(workspace, config)
    if config.annotate.teacher.models:
        return [workspace.teacher_models / "models.json", *(folder / name for folder in folders for name in FILES)]
    return [folder / "run.json" for folder in folders]


def _changed(context: Context) -> str | None:
    models = context.config.annotate.teacher.models
    return changed_models(context.workspace, models) if models else None


STAGE = Stage(
    name="fit-teacher",
    unit="classifiers",
    code_version=1,
    inputs=("prepare",),
    settings=_settings,
    outputs=_outputs,
    changed=_changed,
    check=_check,
    check_early=_check_early,
    run=_run,
    incremental=True,
)
