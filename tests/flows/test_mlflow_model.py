"""The MLflow model, where there is no csm but the one in its folder."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from csm.calibrated import load_calibrated
from flows.mlflow_model import save_mlflow
from tests.ports import free_port

ALONE = """
import json, sys
import mlflow.pyfunc, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(np.load(sys.argv[2]))
import csm
heavy = [name for name in ("ray", "transformers", "diffusers", "flows") if name in sys.modules]
print(json.dumps({"csm": csm.__file__, "found": found.tolist(), "dtype": str(found.dtype), "heavy": heavy}))
"""


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)


def elsewhere():
    """An environment in which this checkout cannot be imported, but for what the interpreter was installed with; MLflow calls uvicorn."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "PATH": path}


def test_it_runs_in_a_process_of_its_own_on_the_code_in_its_folder(modelled, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    folder = modelled / "model" / "mlflow"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "images.npy")],
        cwd=tmp_path,
        env=elsewhere(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert Path(said["csm"]).is_relative_to(folder / "code")
    assert (said["dtype"], said["heavy"]) == ("float32", [])
    expected = load_calibrated(modelled / "model").predict(torch.from_numpy(images))
    np.testing.assert_allclose(said["found"], expected.numpy(), rtol=0, atol=1e-5)


def test_it_says_what_it_takes_and_gives(modelled, images):
    model = mlflow.pyfunc.load_model(modelled / "model" / "mlflow")
    inputs, outputs = model.metadata.signature.inputs.inputs[0], model.metadata.signature.outputs.inputs[0]
    assert (inputs.type, inputs.shape) == (np.dtype("uint8"), (-1, 8, 8, 1))
    assert (outputs.type, outputs.shape) == (np.dtype("float32"), (-1, 10))
    assert model.metadata.metadata["class_names"] == [str(digit) for digit in range(10)]
    assert model.input_example.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(model.predict(images, {"batch_size": 2}), model.predict(images), rtol=0, atol=1e-6)
    for wrong in (images[:, :4], images.astype(np.float32), images[0]):
        with pytest.raises(MlflowException) as refused:
            model.predict(wrong)
        assert refused.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="batch_size: expected a whole number above 0, got 0"):
        model.predict(images, {"batch_size": 0})
    pinned = (modelled / "model" / "mlflow" / "requirements.txt").read_text().split()
    assert all("==" in line for line in pinned)
    assert "torch==2.13.0" in pinned


def test_it_is_saved_quickly_and_replaces_what_was_there(modelled, images, tmp_path):
    model = load_calibrated(modelled / "model")
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "old").touch()
    started = time.process_time()
    save_mlflow(model, tmp_path / "mlflow", torch.from_numpy(images))
    assert time.process_time() - started < 3
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow"]
    assert not (tmp_path / "mlflow" / "old").exists()
    np.testing.assert_array_equal(
        mlflow.pyfunc.load_model(tmp_path / "mlflow").predict(images), model.predict(torch.from_numpy(images))
    )


@pytest.mark.slow
def test_mlflow_serves_it_and_onnx_and_safetensors_give_the_same(modelled, images, tmp_path, processes):
    """All of them are asked for the same images: over HTTP, by onnxruntime, and by torch."""
    import onnxruntime

    from flows.export_model import export_model

    for form in ("onnx", "safetensors"):
        export_model(modelled, None, form, tmp_path / form)
    expected = load_calibrated(tmp_path / "safetensors").predict(torch.from_numpy(images)).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, rtol=0, atol=1e-5)
    command = ["models", "serve", "--model-uri", str(modelled / "model" / "mlflow"), "--env-manager", "local"]
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path,
            env=elsewhere(),
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}/invocations"

        def ask(inputs):
            request = urllib.request.Request(url, json.dumps({"inputs": inputs}).encode(), {"content-type": "application/json"})
            return json.load(urllib.request.urlopen(request, timeout=60))["predictions"]

        end = time.monotonic() + 200
        while True:
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        np.testing.assert_allclose(ask(images.tolist()), expected, rtol=0, atol=1e-5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(images[:, :4].tolist())
        assert refused.value.code == 400
    finally:
        processes.kill([server.pid, *processes.descendants(server.pid)])
        server.wait()
