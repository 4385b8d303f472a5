"""Finished classifiers as the teacher's members: which are found and refused, what is copied, and when it is out of date."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from csm import storage
from csm.classifiers import build_classifier, build_ensemble, load_classifier
from csm.encoders import Sources
from csm.encoders.classifier import load_teacher
from csm.errors import InputError
from csm.locations import location
from flows import fit_teacher
from flows.annotators import TeacherConfig
from flows.config import load_config
from flows.fit_teacher import members
from flows.reuse import stale
from flows.sweeps import trial_config
from flows.teacher_models import find_models
from tests.flows.finished_model import context_of, run_stages

FORCED = ("fit-teacher",)


@pytest.fixture
def second(modelled: Path, tmp_path: Path) -> Path:
    """A workspace with the same images and nothing else."""
    root = tmp_path / "second"
    for name in ("stages/prepare.json", "dataset.json", "real"):
        source = modelled / name
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
    return root


@pytest.fixture
def first(modelled: Path, tmp_path: Path) -> Path:
    """The classifiers of another workspace."""
    return Path(shutil.copytree(modelled / "runs", tmp_path / "first" / "runs")).parent


def take(root: Path, *models: Path | str, forced: tuple[str, ...] = ()) -> bool:
    """Run the stage; whether it was reused."""
    return run_stages(with_models(root, *models, forced=forced), "fit-teacher")["fit-teacher"]


def with_models(root: Path, *models: Path | str, forced: tuple[str, ...] = ()):
    return context_of(root, f"annotate.teacher.models=[{', '.join(map(str, models))}]", forced=forced)


def same(folder: Path, other: Path) -> bool:
    return all(
        storage.file_digest(folder / name) == storage.file_digest(other / name) for name in ("model.json", "model.safetensors")
    )


def test_what_a_glob_finds_is_copied_in_order_and_is_the_teacher(first: Path, second: Path, modelled: Path) -> None:
    glob, finished = first / "runs" / "cross-entropy-seed*", modelled / "model"
    assert not take(second, glob, finished, first / "runs" / "cross-entropy-seed0")  # named twice, taken once
    context = with_models(second, glob, finished)
    copies = members(context.workspace, context.config)
    sources = [first / "runs" / f"cross-entropy-seed{seed}" for seed in (0, 1)] + [finished]
    assert len(copies) == 3
    assert all(same(*pair) for pair in zip(copies, sources, strict=True))
    assert len(load_teacher(Sources(second, copies)).members) == 3
    record = context.workspace.record("fit-teacher")
    assert record is not None
    assert record.rows == 3


def test_the_copies_outlive_what_they_were_taken_from(first: Path, second: Path) -> None:
    take(second, first / "runs" / "cross-entropy-seed*")
    shutil.rmtree(first)
    assert take(second, first / "runs" / "cross-entropy-seed*")
    context = with_models(second, first / "runs" / "cross-entropy-seed*")
    fit_teacher.STAGE.check_early(context)
    fit_teacher.STAGE.check(context)
    assert stale(context, "fit-teacher") is None
    for other in (
        with_models(second, first / "nope"),
        with_models(second, first / "runs" / "cross-entropy-seed*", forced=FORCED),
    ):
        with pytest.raises(InputError, match=r"annotate\.teacher\.models: .* matches no folder"):
            fit_teacher.STAGE.check_early(other)


def test_other_classifiers_at_the_same_place_are_taken_anew(first: Path, second: Path) -> None:
    glob = first / "runs" / "cross-entropy-seed*"
    take(second, glob)
    before = with_models(second).workspace.record("fit-teacher").digest
    shutil.copy(first / "runs" / "label-smoothing-seed0" / "model.safetensors", first / "runs" / "cross-entropy-seed1")
    reason = stale(with_models(second, glob), "fit-teacher")
    assert reason == f"was made from other classifiers ({first}/runs/cross-entropy-seed1 has changed)"
    assert not take(second, glob)
    assert take(second, glob)
    assert with_models(second).workspace.record("fit-teacher").digest != before
    shutil.copytree(first / "runs" / "cross-entropy-seed1", first / "runs" / "cross-entropy-seed2")
    assert stale(with_models(second, glob), "fit-teacher").endswith("cross-entropy-seed2 is new)")


def test_a_second_round_in_one_workspace_comes_to_an_end(first: Path, second: Path) -> None:
    """What is trained anew with the teacher's labels is not the teacher of the next command."""
    shutil.copytree(first / "runs", second / "runs")
    glob = second / "runs" / "label-smoothing-seed*"
    take(second, glob)
    shutil.copy(first / "runs" / "cross-entropy-seed0" / "model.safetensors", second / "runs" / "label-smoothing-seed0")
    assert take(second, glob)
    context = with_models(second, glob)
    assert same(members(context.workspace, context.config)[0], first / "runs" / "label-smoothing-seed0")
    assert not take(second, glob, forced=FORCED)
    assert same(members(context.workspace, context.config)[0], second / "runs" / "label-smoothing-seed0")


def test_an_ensemble_is_one_member(first: Path, second: Path) -> None:
    runs = [load_classifier(first / "runs" / f"cross-entropy-seed{seed}") for seed in (0, 1)]
    build_ensemble(runs).save(first / "both")
    take(second, first / "both")
    context = with_models(second, first / "both")
    (copy,) = members(context.workspace, context.config)
    assert load_classifier(copy).spec.members == 2


def test_models_may_lie_on_a_store(first: Path, second: Path) -> None:
    for seed in (0, 1):
        for name in ("model.json", "model.safetensors"):
            source = first / "runs" / f"cross-entropy-seed{seed}" / name
            location(f"memory://teachers/seed{seed}/{name}").write_bytes(source.read_bytes())
    take(second, "memory://teachers/seed*")
    context = with_models(second, "memory://teachers/seed*")
    copies = members(context.workspace, context.config)
    assert all(same(copy, first / "runs" / f"cross-entropy-seed{seed}") for seed, copy in enumerate(copies))
    assert len(copies) == 2
    assert stale(context, "fit-teacher") is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("runs/nope*", "annotate.teacher.models: ROOT/runs/nope* matches no folder; name folders of classifiers"),
        ("nope", "annotate.teacher.models: ROOT/nope matches no folder"),
        ("runs", "annotate.teacher.models: ROOT/runs holds no model.safetensors: it is no finished classifier"),
    ],
)
def test_what_is_no_classifier_is_named(first: Path, second: Path, pattern: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        fit_teacher.STAGE.check(with_models(second, first / pattern))
    assert str(caught.value).startswith(message.replace("ROOT", str(first)))
    with pytest.raises(InputError):
        find_models([str(first / "runs" / "cross-entropy-seed0"), str(first / pattern)])


def test_classes_and_channels_must_be_those_of_the_data(first: Path, second: Path) -> None:
    spec = load_classifier(first / "runs" / "cross-entropy-seed0").spec
    names = spec.class_names
    for changed, message in (
        (
            replace(spec, class_names=("zero", *names[1:])),
            "has other classes (zero, 1, 2, 3, 4, ...) than digits (0, 1, 2, 3, 4, ...)",
        ),
        (replace(spec, class_names=names[::-1]), "has the classes in another order (9, 8, 7, 6, 5, ...) than"),
        (replace(spec, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3), "takes images of 3 channels, digits has 1"),
    ):
        build_classifier(changed).save(first / "other")
        with pytest.raises(InputError) as caught:
            fit_teacher.STAGE.check(with_models(second, first / "other"))
        assert f"annotate.teacher.models: {first}/other {message}" in str(caught.value)


def test_damaged_weights_are_named_by_where_they_come_from(first: Path, second: Path) -> None:
    file = first / "runs" / "cross-entropy-seed0" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"^annotate.teacher.models: {file.parent}: .* is not a whole safetensors file"):
        take(second, file.parent)


def test_how_a_teacher_is_trained_means_nothing_for_finished_models() -> None:
    config = load_config("demo", ["annotate.teacher.models=[a]"])  # it says how to train a teacher
    assert config.annotate.teacher == TeacherConfig(models=("a",))
    settings = ("network=resnet18", "parameters={}", "optimizer.epochs=3")
    config = load_config("demo", ["annotate.teacher.models=[a]", *(f"annotate.teacher.{setting}" for setting in settings)])
    assert config.annotate.teacher == TeacherConfig(models=("a",))
    assert trial_config(config, {"train.optimizer.epochs": 3}).annotate.teacher == config.annotate.teacher
