import pytest

from tests.flows.reuse.pipeline import Pipeline


@pytest.fixture
def pipeline(tmp_path):
    return Pipeline(tmp_path)


@pytest.fixture
def made(pipeline):
    """A pipeline that was run once."""
    assert pipeline.run() == ["source", "table", "end"]
    return pipeline
