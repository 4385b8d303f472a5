from dataclasses import replace
from pathlib import Path

import pytest

from csm.datasets import load_dataset
from csm.errors import InputError
from flows import fit_teacher, train
from flows.artifacts import Workspace
from flows.config import load_config
from flows.folders import absolute_folders
from flows.networks import check_train, network_settings
from flows.stages import Context


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder below the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return "model"


def context(root: Path, *overrides: str) -> Context:
    config = load_config("demo", overrides)
    stages = {stage.name: stage for stage in (fit_teacher.STAGE, train.STAGE)}
    return Context(config, Workspace(root), stages)


def test_files_of_a_network_are_part_of_what_classifiers_depend_on(model: str) -> None:
    plain = load_config("demo").train
    assert network_settings(plain) == {}
    config = load_config("demo", ("train.network=transformers", f"train.parameters.path={model}"))
    before = [stage.settings(config) for stage in (fit_teacher.STAGE, train.STAGE)]
    assert before == [stage.settings(config) for stage in (fit_teacher.STAGE, train.STAGE)]
    Path(model, "config.json").write_text("{ }")
    after = [stage.settings(config) for stage in (fit_teacher.STAGE, train.STAGE)]
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert network_settings(replace(config.train, parameters={"path": "owner/name"})) == {"path": "owner/name"}


def test_workers_get_the_whole_path(model: str) -> None:
    parameters = {"path": model, "pretrained": True, "other": "owner/name", "size": 3}
    assert absolute_folders(parameters) == {**parameters, "path": str(Path.cwd() / model)}


@pytest.mark.parametrize("stage", [fit_teacher.STAGE, train.STAGE], ids=lambda stage: stage.name)
def test_a_network_that_cannot_be_built_is_said_before_the_work(stage: object, tmp_path: Path) -> None:
    for overrides, message in (
        (
            ("train.network=resnet18", "train.parameters.stem=x"),
            "train.network resnet18: stem: unknown 'x'; one of cifar, tiny, imagenet",
        ),
        (
            ("train.network=transformers", "train.parameters.path=nowhere"),
            "train.network transformers: path: folder 'nowhere' does",
        ),
    ):
        with pytest.raises(InputError, match=message):
            stage.check(context(tmp_path, *overrides))


def test_the_size_of_the_images_is_asked_once_it_is_known(tmp_path: Path) -> None:
    asked = context(tmp_path, "train.network=densenet121", "train.parameters.stem=tiny")
    check_train(asked)
    load_dataset("digits").save(tmp_path)
    with pytest.raises(
        InputError, match=r"train.network densenet121: images of 8 x 8 are too small; with this stem they have at least 15"
    ):
        check_train(asked)
    check_train(context(tmp_path, "train.network=densenet121"))


TEACHER = (
    "annotate.teacher.network=resnet18",
    "annotate.teacher.parameters={stem: cifar}",
    "annotate.teacher.optimizer={epochs: 5}",
)


def test_a_teacher_of_its_own_settings_stays_while_train_changes() -> None:
    changes = ("train.optimizer.learning_rate=0.3", "train.network=resnet18", "train.parameters.stem=tiny")
    plain, changed = (fit_teacher.STAGE.settings(load_config("demo", overrides)) for overrides in ((), changes))
    assert plain != changed
    own, still = (fit_teacher.STAGE.settings(load_config("demo", overrides)) for overrides in (TEACHER, (*TEACHER, *changes)))
    assert own == still
    assert own["train"]["network"] == "resnet18"
    assert own["train"]["parameters"] == {"stem": "cifar"}
    assert own["train"]["optimizer"]["epochs"] == 5
    assert train.STAGE.settings(load_config("demo", TEACHER)) == train.STAGE.settings(load_config("demo"))


def test_a_teacher_that_says_what_train_says_is_the_same_teacher() -> None:
    said = ("annotate.teacher.network=small-cnn", "annotate.teacher.optimizer={epochs: 60}")
    plain = load_config("gaussians-k4", ["train.optimizer.epochs=60"])
    assert fit_teacher.STAGE.settings(load_config("gaussians-k4", ["train.optimizer.epochs=60", *said])) == (
        fit_teacher.STAGE.settings(plain)
    )


def test_parameters_of_the_teachers_network_are_trains_for_the_same_network_only() -> None:
    wide = ("train.parameters.width=8",)
    assert fit_teacher.STAGE.settings(load_config("demo", wide))["train"]["parameters"] == {"width": 8}
    other = load_config("demo", (*wide, "annotate.teacher.network=resnet18"))
    assert fit_teacher.STAGE.settings(other)["train"]["parameters"] == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network=nope", "annotate.teacher.network: unknown 'nope'; one of small-cnn"),
        ("parameters.nope=1", "annotate.teacher.parameters.nope: no such setting; allowed: width"),
        ("parameters.width=much", "annotate.teacher.parameters.width: expected a whole number, got 'much'"),
        ("optimizer.nope=1", "annotate.teacher.optimizer.nope: no such setting; allowed: kind, epochs"),
        (
            "optimizer.warmup=180",
            "annotate.teacher.optimizer.warmup: expected fewer than the 180 epochs of the training, got 180",
        ),
        (
            "optimizer={schedule: multi-step}",
            "annotate.teacher.optimizer.milestones: missing; schedule multi-step needs the epochs",
        ),
        ("nope=1", "annotate.teacher.nope: no such setting; allowed: network, parameters, optimizer"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("demo", [f"annotate.teacher.{override}"])
    assert str(caught.value).startswith(message)


def test_a_teachers_network_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^annotate\.teacher\.network resnet18: stem: unknown 'x'"):
        fit_teacher.STAGE.check(context(tmp_path, "annotate.teacher.network=resnet18", "annotate.teacher.parameters.stem=x"))
