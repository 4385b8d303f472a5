"""`csm prepare` on tiny files of each real format, and a classifier that learns from what it leaves."""

import json
import math
from typing import Any

import pytest

from csm.classifiers import Classifier, ClassifierSpec
from csm.classifiers.small_cnn import SmallCNN
from csm.datasets import RealDataset
from csm.training import Method, OptimizerConfig, fit
from flows import cli
from tests.csm.datasets.conftest import cifar, hub_folder, npz_file, tar_folder, tiny_imagenet_folder

__all__ = ["cifar", "hub_folder", "npz_file", "tar_folder", "tiny_imagenet_folder"]

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar10": ("cifar", {}),
    "cifar100": ("cifar", {"labels": "coarse"}),
    "tiny-imagenet": ("tiny_imagenet_folder", {"size": 6}),
    "huggingface": ("hub_folder", {"val": 0.2}),
    "npz": ("npz_file", {"size": 8}),
    "webdataset": ("tar_folder", {"test": 0.2, "channels": 1}),
}


def prepare(data, workspace, capsys):
    """Exit code, stdout and stderr of `csm prepare` in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "--config", "digits", "--set", f"data={data}", "--workspace", str(workspace), "--json"])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_prepared_and_trained_on(source, request, tmp_path, capsys):
    fixture, settings = SOURCES[source]
    path = request.getfixturevalue(fixture)
    path = path(source) if fixture == "cifar" else path
    data = json.dumps({"source": source, "path": str(path), **settings})
    for reused in (False, True):
        code, out, err = prepare(data, tmp_path / "w", capsys)
        assert code == 0, err
        assert json.loads(out.splitlines()[-1])["stages"]["prepare"]["reused"] is reused

    data = RealDataset.load(tmp_path / "w")
    info = data.info
    assert info.name == source or info.name == path.stem
    spec = ClassifierSpec("small-cnn", {}, info.shape[2], info.class_names, info.mean, info.std)
    classifier = Classifier(SmallCNN(info.shape[2], info.n_classes, width=4), spec)
    losses = []
    optimizer = OptimizerConfig(epochs=1, batch_size=8)
    fit(
        classifier, data.split("train"), data.split("val"), Method(), optimizer, 0, on_epoch=lambda _, v: losses.append(v["loss"])
    )
    assert len(losses) == 1
    assert math.isfinite(losses[0])


def test_a_source_without_a_path_is_refused_in_one_line(tmp_path, capsys):
    code, _, err = prepare("{source: cifar10}", tmp_path / "w", capsys)
    assert (code, err) == (2, "csm: data.path: missing; set it, for example --set data.path=VALUE\n")
