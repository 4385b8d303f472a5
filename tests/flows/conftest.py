"""What the tests of `flows` share: models of the real formats, a finished model, stores that are quickly made, the command line."""

import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from tests.csm.generators.conftest import dit_pipeline, stable_diffusion_pipeline, unet_pipeline
from tests.csm.generators.edm.conftest import snapshot as edm_snapshot
from tests.flows.outcomes import Copy

__all__ = ["dit_pipeline", "edm_snapshot", "stable_diffusion_pipeline", "unet_pipeline"]


@pytest.fixture(scope="session", autouse=True)
def tables_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """New MLflow stores of this process are copies of one: its migrations take seconds each time."""
    from mlflow.store.db import utils
    from sqlalchemy import create_engine

    empty, make = tmp_path_factory.mktemp("store") / "empty.db", utils._initialize_tables

    def copy_tables(engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not utils._is_empty_database(engine):
            make(engine)
            return
        if not empty.exists():
            first = create_engine(f"sqlite:///{empty}")
            make(first)
            first.dispose()
        with closing(sqlite3.connect(empty)) as source, closing(engine.raw_connection()) as target:
            source.backup(target.driver_connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copy_tables)
        yield


@pytest.fixture(scope="session")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished model, which is registered as `csm-small`; tests only read it."""
    from tests.flows.finished_model import context_of, run_stages

    root = tmp_path_factory.mktemp("modelled") / "workspace"
    run_stages(context_of(root), "prepare", "train", "model")
    return root


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str], str]:
    """``config_file(text)`` writes a configuration of that text and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Copy:
    """``copy(*without)`` copies the finished workspace, without the MLflow store, which names its folder, and without ``without``."""

    def make(*without: str) -> Path:
        target = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(
            finished.root, target, ignore=shutil.ignore_patterns("mlflow.db", "tracking.json", "mlartifacts", *without)
        )
        return target

    return make


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``call(*arguments)`` runs the command line here, where imports are paid for already; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["csm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def refused(call):
    """``refused(*arguments)`` runs a command that must be refused and gives its one line, without ``csm: ``."""

    def run(*arguments):
        code, out, err = call(*arguments)
        assert code == 2, err
        assert out == ""
        said = [line for line in err.splitlines() if not line.endswith(": reused") and ": reused (" not in line]
        assert len(said) == 1, err
        assert said[0].startswith("csm: ")
        return said[0].removeprefix("csm: ")

    return run
