"""Finished models in the store's registry."""

import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from csm import storage
from csm.errors import InputError


@pytest.fixture
def model(tmp_path):
    """As good as an MLflow model for a registry: ``model(weights)`` writes a folder of it."""

    def write(weights):
        folder = tmp_path / "mlflow"
        folder.mkdir(exist_ok=True)
        for name, text in (("MLmodel", f"made: {time.time()}"), ("weights", weights)):
            storage.write_text(folder / name, text)
        return folder

    return write


def versions(client, name):
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))


def test_a_model_has_a_version_for_each_content_and_the_files_of_each_stay(tracker, client, model):
    tracker.open_run("model", "model", {}, {})
    for weights in ("first", "first", "second"):
        tracker.register_model("model", model(weights), "csm-digits", "the best", {"csm.method": "csm"})
    first, second = versions(client, "csm-digits")
    assert [version.run_id for version in (first, second)] == [tracker.run_id("model")] * 2
    assert first.tags["csm.method"] == "csm"
    assert first.description == "the best"
    assert client.get_registered_model("csm-digits").tags["csm.made_by"] == "csm"
    texts = [(Path(unquote(urlsplit(version.source).path)) / "weights").read_text() for version in (first, second)]
    assert texts == ["first", "second"]


def test_a_registered_model_of_somebody_else_is_left_alone(tracker, client, model, capsys):
    client.create_registered_model("theirs")
    tracker.open_run("refused", "refused", {}, {})
    for refused in (
        lambda: tracker.check_model_name("theirs"),
        lambda: tracker.register_model("refused", model("x"), "theirs", "", {}),
    ):
        with pytest.raises(InputError, match="there is a registered model theirs that csm did not make; choose another name"):
            refused()
    tracker.check_model_name("free")
    # made by somebody else between the check and the sending, as with a server that was down
    folder = model("x")
    tracker._sender.append({"do": "model", "key": "refused", "name": "theirs", "description": "", "tags": {}}, folder)
    assert tracker.flush()
    assert "refused a record (there is a registered model theirs" in capsys.readouterr().err
    assert versions(client, "theirs") == []


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's"])
def test_a_name_that_no_model_can_have(tracker, name):
    with pytest.raises(InputError, match="choose another name"):
        tracker.check_model_name(name)
