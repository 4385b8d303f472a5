"""ONNX against torch, by onnxruntime."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch

from csm import onnx_export
from csm.calibrated import calibrated
from csm.classifiers import ClassifierSpec, build_classifier
from csm.errors import InputError
from csm.onnx_export import EXPORTABLE, export_onnx
from csm.posthoc import POSTHOC, fit_posthoc

CLASSES = 4


def make(network="small-cnn", posthoc="temperature", size=8, members=1):
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(200, CLASSES, generator=draw)
    labels = torch.multinomial((2 * logits).softmax(dim=1), 1, generator=draw).squeeze(1)
    torch.manual_seed(0)
    parameters = {"width": 4} if network == "small-cnn" else {}
    spec = ClassifierSpec(network, parameters, 3, tuple("abcd"), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), members)
    return calibrated(build_classifier(spec), (size, size, 3), fit_posthoc(posthoc, logits, labels), {})


def images(number, size=8):
    return torch.randint(0, 256, (number, size, size, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def check(model, path, capfd):
    size = model.spec.shape[0]
    said = export_onnx(model, path, images(70, size))
    assert capfd.readouterr() == ("", "")  # the exporter is chatty
    assert 0 <= said <= 1e-5
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", size, size, 3])
    assert (gives.name, gives.type, gives.shape) == ("probabilities", "tensor(float)", ["batch", CLASSES])
    for number in (1, 2, 33):
        batch = images(number, size)
        (found,) = session.run(None, {"images": batch.numpy()})
        logits = model.classifier(batch.permute(0, 3, 1, 2)).detach()
        expected = POSTHOC[model.spec.posthoc.name].apply(logits.double(), model.spec.posthoc.values).exp()
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_onnxruntime_gives_what_torch_gives_for_batches_of_any_size(tmp_path, capfd):
    check(make(), tmp_path / "model.onnx", capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_ensemble_is_one_file(tmp_path, capfd):
    check(make(members=3), tmp_path / "model.onnx", capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("posthoc", EXPORTABLE)
def test_every_posthoc_method_that_can_be_exported(posthoc, tmp_path, capfd):
    check(make(posthoc=posthoc), tmp_path / "model.onnx", capfd)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet18", "wide-resnet-28-10"])
def test_networks(network, tmp_path, capfd):
    check(make(network), tmp_path / "model.onnx", capfd)


@pytest.mark.parametrize("posthoc", sorted(set(POSTHOC) - set(EXPORTABLE)))
def test_calibration_with_steps_or_knots_is_refused(posthoc, tmp_path):
    with pytest.raises(InputError, match=f"posthoc {posthoc} cannot be exported to ONNX: fit one of none, temperature"):
        export_onnx(make(posthoc=posthoc), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"the package onnxscript, which is not installed: pip install 'csm\[onnx\]'"):
        export_onnx(make(), tmp_path / "model.onnx")


def test_a_network_that_cannot_be_exported_is_one_line(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("first line\nand pages of text")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(InputError) as refused:
        export_onnx(make(), tmp_path / "model.onnx")
    assert str(refused.value) == (
        "network small-cnn cannot be exported to ONNX (RuntimeError: first line): export to safetensors or mlflow"
    )


def test_what_differs_from_torch_is_not_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="onnxruntime differs from torch by"):
        export_onnx(make(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
