"""A measurement on a worker such as the stages have."""

from collections.abc import Callable

import ray
import torch
from ray.exceptions import RayTaskError

from cluster.resources import fits
from csm.errors import InputError


def on_worker(measure: Callable[[], float], cpus: float, gpus: float) -> float:
    """What ``measure`` returns in a worker of the cluster that takes ``cpus`` and ``gpus``. Needs a Ray session.

    Raises:
        InputError: no node is large enough, or what ``measure`` raises.
    """
    if not any(fits(cpus, gpus, node["Resources"]) for node in ray.nodes() if node["Alive"]):
        raise InputError(f"no node of the cluster has {cpus:g} CPU and {gpus:g} GPU")
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(in_threads)
    try:
        return float(ray.get(task.remote(measure, cpus)))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, InputError) else error) from None


def in_threads(measure: Callable[[], float], cpus: float) -> float:
    """``measure()`` with as many torch threads as a worker of ``cpus`` has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, round(cpus)))
    try:
        return measure()
    finally:
        torch.set_num_threads(before)
