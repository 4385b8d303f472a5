"""Time on the device that a benchmark runs on, and memory of a process of its own."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def device_kind() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def in_a_process(function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)``, called in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_mib(process: int | str = "self") -> int:
    """The most memory in MiB that ``process`` has had resident."""
    # Not ru_maxrss: that of a process starts with its parent's.
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) / 1024)
