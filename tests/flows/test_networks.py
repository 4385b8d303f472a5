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
