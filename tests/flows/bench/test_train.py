"""The figures of `csm bench train`, on few images and a tiny network; and that both ways train on the same images."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from csm import classifiers
from csm.classifiers import NETWORKS, SmallCNN
from csm.schedules import Schedule
from flows.bench import train as bench
from flows.cli import cli

KEYS = ["network", "device", "threads", "steps", "batch", "baseline_images_per_s", "images_per_s", "ratio", "baseline_wait_share"]
KEYS += ["data_share", "precision", "channels_last", "compile", "baseline_peak_mib", "peak_mib", "load_before"]


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    monkeypatch.setattr(bench, "SETS", 2)


@pytest.fixture
def in_this_process(monkeypatch):
    """Without new processes, which take seconds to start, and with few images of a step."""
    monkeypatch.setattr(bench, "_in_a_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench, "LOADERS", 0)
    monkeypatch.setattr(bench, "OPTIMIZER", bench.replace(bench.OPTIMIZER, batch_size=8))
    monkeypatch.setitem(NETWORKS, "tiny", lambda channels, n_classes: SmallCNN(channels, n_classes, width=4))


def test_the_numbers_belong_together(in_this_process):
    said = CliRunner().invoke(cli, ["bench", "train", "--network", "tiny", "--steps", "2", "--json"])
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout.splitlines()[-1])
    assert list(result) == KEYS
    assert (result["network"], result["steps"], result["batch"], result["precision"]) == ("tiny", 2, 24, "float32")
    assert result["ratio"] == pytest.approx(result["images_per_s"] / result["baseline_images_per_s"], rel=0.05)
    assert 0 < result["baseline_wait_share"] < 1  # without loaders, all of the data path
    assert result["data_share"] > 0


def test_variants_are_every_precision_layout_and_compilation(in_this_process, monkeypatch):
    asked = []

    def ours(network, steps, setting):
        asked.append(setting)
        return {"seconds": 2.0, "peak": 1, "precision": "float32"}

    monkeypatch.setattr(bench, "_ours", ours)
    result = bench.training_speed(1, "tiny", variants=True)
    assert len(result["variants"]) == len(set(asked[2:])) == 8
    assert {row["images_per_s"] for row in result["variants"]} == {12.0}


def test_the_files_are_the_images_of_ours(tmp_path):
    bench._write_png(tmp_path, 20)
    (real, labels), mixed = bench._images(20)
    files = bench._Files(tmp_path)
    assert len(files) == 20
    assert [int(path.stem.split("_")[1]) for path in files.real] == labels.tolist()
    for path, image in zip(files.real, real, strict=True):
        assert np.array_equal(np.array(bench.Image.open(path)), image.permute(1, 2, 0).numpy())
    a, b, step = 3, 7, 2
    row = mixed.rows[((mixed.class_a == a) & (mixed.class_b == b)).nonzero()[1, 0], step]  # the second set of the pair
    assert np.array_equal(
        np.array(bench.Image.open(tmp_path / "mixed" / f"{a}_{b}_1_{step}.png")), mixed.images[row].permute(1, 2, 0)
    )
    assert torch.allclose(mixed.labels[row], bench.soft_label(a, b, step))
    assert mixed.labels[row, a] == pytest.approx(2 / 7)


def test_both_ways_draw_companions_by_the_same_rule(tmp_path):
    """The own endpoint, whose soft label is the class itself, and an interior image of the same pair."""
    bench._write_png(tmp_path, 40)
    files = bench._Files(tmp_path)
    for index in range(40):
        _, label, mixed, soft = files[index]
        assert mixed.shape == (2, 3, 32, 32)
        assert soft[0, label] == 1
        assert 0 < soft[1, label] < 1
        assert soft[1].sum() == pytest.approx(1)
    (_, labels), mixed_set = bench._images(40)
    rows = Schedule("pair", 2, mixed_set, 10).draw(labels, torch.Generator().manual_seed(0))
    soft = mixed_set.labels[rows].view(2, 40, 10)
    assert (soft[0].argmax(dim=1) == labels).all()
    assert (soft[0].amax(dim=1) == 1).all()
    inner = soft[1][torch.arange(40), labels]
    assert ((inner > 0) & (inner < 1)).all()


def test_an_item_is_a_crop_of_its_image(tmp_path):
    bench._write_png(tmp_path, 10)
    (real, _), _ = bench._images(10)
    item = bench._Files(tmp_path)[0][0]
    pixels = item * torch.tensor(bench.STD).view(3, 1, 1) + torch.tensor(bench.MEAN).view(3, 1, 1)
    padded = torch.nn.functional.pad(real[0], (4, 4, 4, 4)).float() / 255
    crops = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    assert any(torch.allclose(pixels, other, atol=1e-5) for crop in crops for other in (crop, crop.flip(-1)))


def test_networks_of_the_benchmark_are_there():
    assert set(bench.NETWORK.values()) <= set(classifiers.NETWORKS)
