"""A sweep whose driver ends in the middle goes on where it was."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from csm import storage
from csm.datasets.real import build

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRIVER = """
import sys
from functools import partial
from pathlib import Path
from cluster.resources import Group
from cluster.session import session
from cluster.tuning import run_trials
from cluster.tuning_trials import Race
from csm.methods import Method
from csm.optimization import OptimizerConfig
from csm.runs import RunSpec

root = Path(sys.argv[2])

def build(root, number, values):
    return (RunSpec(run=f"t{number}", method="m", seed=0, directory=root / f"{number:04d}", data=root, network="small-cnn",
        parameters={"width": 4}, settings=Method(), optimizer=OptimizerConfig(epochs=150, batch_size=12), mixed=None,
        fingerprint=str(number)),)

numbers = iter(range(4))
def ask():
    number = next(numbers, None)
    return None if number is None else (number, {})

with session(sys.argv[1]):
    run_trials(ask, partial(build, root), Race(epochs=150), Group(workers=1), 1, root / "ray", "test",
        lambda event: print(event.trial, event.kind, event.epoch, flush=True))
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_the_same_sweep_again_trains_nothing_twice(ray_address, tmp_path, by):
    draw = np.random.default_rng(1)
    labels = np.arange(60) % 2
    images = draw.integers(0, 200, (60, 8, 8, 1)).astype(np.uint8)
    build("noise", images, labels, np.array(["train", "val", "train", "test", "train"] * 12), ["a", "b"]).save(tmp_path)
    command = [sys.executable, "-c", DRIVER, ray_address, str(tmp_path)]
    cwd = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("1 done"):
                break
        driver.send_signal(by)
        started = time.monotonic()
        _, errors = driver.communicate(timeout=120)
        assert driver.returncode != 0
        if by == signal.SIGINT:
            assert time.monotonic() - started < 60
            assert "KeyboardInterrupt" in errors
    before = {number: (tmp_path / f"{number:04d}" / "run.json").stat().st_mtime_ns for number in range(2)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True, cwd=cwd)
    for number in range(4):
        told = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith(f"{number} ")]
        assert told == ["started 0", *(f"epoch {epoch}" for epoch in range(1, 151)), "done 0"]
        assert len(storage.read_json(tmp_path / f"{number:04d}" / "history.json")) == 150
    assert before == {number: (tmp_path / f"{number:04d}" / "run.json").stat().st_mtime_ns for number in range(2)}
