"""Models of the real formats with random weights, as tests/csm/generators has them, and a workspace with a finished model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.csm.generators.conftest import dit_pipeline, stable_diffusion_pipeline, unet_pipeline
from tests.csm.generators.edm.conftest import snapshot as edm_snapshot

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
