"""`csm export` of the finished model."""

import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from csm.calibrated import load_calibrated
from csm.errors import InputError
from flows import cli
from flows.export_model import export_model


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("form", ["safetensors", "mlflow"])
def test_what_is_written_is_a_model_again(modelled, images, form, tmp_path, snapshot):
    said = export_model(modelled, None, form, tmp_path / "new" / "model")
    expected = load_calibrated(modelled / "model")
    folder = tmp_path / "new" / "model"
    assert said == {
        "output": str(folder),
        "format": form,
        "model": str(modelled),
        "run": expected.spec.origin["run"],
        "reused": False,
    }
    found = load_calibrated(folder if form == "safetensors" else folder / "artifacts")
    assert found.spec == expected.spec
    assert torch.equal(found.predict(images), expected.predict(images))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    before = snapshot(folder)
    assert export_model(modelled, None, form, folder)["reused"] is True
    assert snapshot(folder) == before


def test_onnx_on_the_command_line(modelled, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["csm"])
    options = ["--format", "onnx", "--workspace", modelled, "--output", tmp_path / "out", "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *map(str, options)])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "export: done\n")
    said = json.loads(out.splitlines()[-1])
    assert 0 <= said["difference"] <= 1e-5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["csm-export.json", "model.json", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    expected = load_calibrated(modelled / "model").predict(images)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["class_names"] == list("0123456789")


def test_folders_that_are_in_use(modelled, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; choose a new or empty folder"):
        export_model(modelled, None, "safetensors", tmp_path / "file")
    with pytest.raises(InputError, match=r"is not empty \(files of something else\); choose a new or empty folder"):
        export_model(modelled, None, "safetensors", tmp_path)
    with pytest.raises(InputError, match="URLs are not supported yet"):
        export_model(modelled, None, "safetensors", Path("s3://bucket"))
    (tmp_path / "empty").mkdir()
    export_model(modelled, None, "safetensors", tmp_path / "empty")
    with pytest.raises(InputError, match=r"is not empty \(format safetensors -> mlflow\)"):
        export_model(modelled, None, "mlflow", tmp_path / "empty")


def test_a_failure_leaves_nothing(modelled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install"):
        export_model(modelled, None, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
