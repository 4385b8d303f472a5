"""Models of the real formats with random weights, as tests/csm/generators has them, and a workspace with a finished model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.csm.generators.conftest import dit_pipeline, stable_diffusion_pipeline, unet_pipeline
from tests.csm.generators.edm.conftest import snapshot as edm_snapshot
from tests.flows.outcomes import Copy

__all__ = ["dit_pipeline", "edm_snapshot", "stable_diffusion_pipeline", "unet_pipeline"]


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
