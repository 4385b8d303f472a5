"""The figures of `csm bench annotate`, on few images; and that both ways annotate the same images alike."""

import json
import os

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from cluster.shards import part_path
from csm import tables
from flows.bench import annotate as bench
from flows.cli import cli

KEYS = ["encoder", "device", "images", "real", "seconds_quarter", "seconds_half", "seconds", "linearity", "images_per_s"]
KEYS += ["forward_share", "peak_mib_quarter", "peak_mib", "baseline_s", "baseline_images_per_s", "baseline_forward_s"]
KEYS += ["baseline_scan_s", "ratio", "max_difference", "load_before"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Without new processes, which take seconds to start."""
    monkeypatch.setattr(bench, "_in_a_process", lambda function, *arguments: function(*arguments))


def test_the_numbers_belong_together(in_this_process):
    said = CliRunner().invoke(cli, ["bench", "annotate", "--images", "60", "--encoder", "small-cnn", "--json"])
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout.splitlines()[-1])
    assert list(result) == KEYS
    assert result["images"] == 64  # whole sets in four equal parts
    assert result["real"] == 40
    assert result["ratio"] == pytest.approx(result["images_per_s"] / result["baseline_images_per_s"], rel=0.1)
    assert 0 < result["forward_share"] < 1
    assert 0 < result["baseline_forward_s"] + result["baseline_scan_s"] <= result["baseline_s"] + 0.02
    assert result["max_difference"] < 0.01


@pytest.mark.parametrize("name", bench.ENCODERS)
def test_both_ways_say_the_same_of_every_image(tmp_path, in_this_process, name):
    total, real = bench._write_images(tmp_path, 400)  # shards of more images than the classifier takes together
    assert len(os.listdir(tmp_path / "mixed-png")) == total
    assert len(os.listdir(tmp_path / "real-png")) == real
    bench._ours(tmp_path, name, 1)
    bench._original(tmp_path, name)
    frames = [tables.read(part_path(tmp_path / "annotations", shard), tables.annotations(10)) for shard in range(4)]
    shares = pl.concat(frames)["lam_raw"].to_numpy()
    assert np.ptp(shares) > 0.05
    assert np.load(tmp_path / "original.npy") == pytest.approx(shares, abs=1e-2)


def test_the_original_calls_once_for_each_real_image_and_each_set(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(bench.ENCODERS, "counting", lambda: Counting(calls))
    bench._write_images(tmp_path, 64)
    bench._original(tmp_path, "counting")
    assert calls == [8] + 40 * [1] + 8 * [8]  # the first to warm up
    calls.clear()
    bench._ours(tmp_path, "counting", 2)
    assert calls == [10, 16, 10, 10, 16, 16]  # a shard to warm up, then two: real images, mixed images


class Counting(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, images):
        self.calls.append(len(images))
        return images[:, :, 0, :2].flatten(1).float()
