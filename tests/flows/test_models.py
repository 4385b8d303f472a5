"""What `--model` takes."""

import shutil

import pytest
import torch
from mlflow.tracking import MlflowClient

from csm.calibrated import load_calibrated
from csm.errors import InputError
from flows.models import open_model
from flows.tracking import store_uri


@pytest.fixture
def forms(modelled):
    """Every way to name the model of a workspace."""
    (version,) = MlflowClient(store_uri(modelled)).search_model_versions("name = 'csm-small'")
    registered = ("models:/csm-small/1", "models:/csm-small/latest", f"runs:/{version.run_id}/model")
    return [str(modelled), str(modelled / "model"), str(modelled / "model" / "mlflow"), *registered]


def test_every_form_gives_the_same_model(modelled, forms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_calibrated(modelled / "model")
    images = torch.randint(0, 256, (3, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for form in forms:
        found = open_model(form, store_uri(modelled))
        assert found.spec == expected.spec
        assert torch.equal(found.predict(images), expected.predict(images))
    assert not list(tmp_path.iterdir())  # MLflow likes to make a store where it is called


def test_an_alias_and_the_store_of_the_environment(modelled, tmp_path, monkeypatch):
    root = tmp_path / "workspace"
    shutil.copytree(modelled, root)
    MlflowClient(store_uri(root)).set_registered_model_alias("csm-small", "best", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri(root))
    assert open_model("models:/csm-small@best").spec == load_calibrated(root / "model").spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere", "--model nowhere: does not exist; give a workspace in which `csm train` ended"),
        (".", "--model .: holds no model.json; give a workspace"),
        ("file", "--model file: is a file, not a folder; give a workspace"),
        ("nope://bucket/model", "--model nope://bucket/model: there is no way to a store of nope://"),
        ("models:/csm-small/1", "--model models:/csm-small/1: in which store? give --tracking-uri, such as sqlite:///"),
    ],
)
def test_what_is_no_model(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as refused:
        open_model(text)
    assert str(refused.value).startswith(said)


def test_the_classifier_of_a_run_is_not_calibrated(modelled):
    with pytest.raises(InputError, match="which nothing calibrates"):
        open_model(str(modelled / "runs" / "cross-entropy-seed0"))


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/nope/1", "does not give it (Registered Model with name=nope not found)"),
        ("models:/nope/latest", "the registry has no version of 'nope'"),
        ("models:/csm-small/7", "does not give it ("),
        ("models:/csm-small@nope", "does not give it ("),
        ("models:/csm-small", "expected models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS"),
        ("runs:/0123/model", "does not give it (Run with id=0123 not found)"),
    ],
)
def test_what_the_registry_does_not_have_is_one_line(modelled, uri, said):
    with pytest.raises(InputError) as refused:
        open_model(uri, store_uri(modelled))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
