"""doctor: what this installation has, what it can reach, and what is wrong with it."""

import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.probe import installed
from csm import __version__
from csm.classifiers import NETWORKS
from csm.datasets import DATASETS
from csm.datasets.shifts import SHIFTS
from csm.encoders import ENCODERS
from csm.errors import InputError
from csm.generators import GENERATORS
from csm.generators.conditioning import OPERATORS
from csm.locations import is_remote, reach
from csm.losses import HARD, SOFT
from csm.metrics import METRICS
from csm.pixel_mixing import PIXEL_MIXING
from csm.posthoc import POSTHOC
from csm.reannotation import CALIBRATORS, HEADS
from csm.schedules import SCHEDULES
from flows.annotators import ENSEMBLE
from flows.config import load_config
from flows.config_layers import config_names
from flows.doctor_cluster import check_cluster, node_lines
from flows.report_run import machine
from flows.tracking_address import OWN, Address

PACKAGES = ("torch", "diffusers", "ray", "mlflow", "polars", "pyarrow", "pydantic", "safetensors", "click")
FREE_BYTES = 2 * 2**30  # the demo needs about a tenth of it


def diagnose(workspace: Path, address: str, tracking: Address = OWN) -> dict[str, Any]:
    """Look at packages, disk, workspace, Ray, and at every node of a cluster.

    Returns:
        Among others ``problems``, a list of lines, each with what to do (empty: all is well).
    """
    problems: list[str] = []
    versions = {name: installed(name) for name in PACKAGES}
    problems += [f"package {name} is not installed: run `make setup`" for name, found in versions.items() if found is None]
    return {
        "csm": __version__,
        "machine": machine(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": versions,
        "workspace": _check_workspace(workspace, problems),
        "ray": _check_ray(workspace, address, tracking, versions, problems),
        "configs": [name for name in config_names() if name != "default"],
        "datasets": list(DATASETS),
        "shifts": list(SHIFTS),
        "generators": list(GENERATORS),
        "operators": list(OPERATORS),
        "annotators": list(load_config("digits").annotate.annotators),
        "encoders": list(ENCODERS),
        "heads": [*HEADS, ENSEMBLE],
        "calibrators": list(CALIBRATORS),
        "networks": list(NETWORKS),
        "losses": list(HARD),
        "soft_losses": list(SOFT),
        "mixing": list(PIXEL_MIXING),
        "schedules": list(SCHEDULES),
        "metrics": list(METRICS),
        "posthoc": list(POSTHOC),
        "problems": problems,
    }


def show(findings: dict[str, Any]) -> None:
    """Print the findings for a person."""
    for key in ("csm", "machine", "executable"):
        print(f"{key:<12}{findings[key]}")
    for name, found in findings["packages"].items():
        print(f"{name:<12}{found or 'MISSING'}")
    print(f"{'workspace':<12}{findings['workspace']['path']}: {findings['workspace']['state']}")
    ray = findings["ray"]
    print(f"{'ray':<12}{ray['address']}: {ray['state']}")
    for line in node_lines(ray.get("each", [])):
        print(line)
    registries = (
        "datasets",
        "shifts",
        "generators",
        "operators",
        "annotators",
        "encoders",
        "heads",
        "calibrators",
        "networks",
        "losses",
        "soft_losses",
        "mixing",
        "schedules",
        "metrics",
        "posthoc",
    )
    for key in ("configs", *registries):
        print(f"{key:<12}{', '.join(findings[key])}")
    for problem in findings["problems"]:
        print(f"problem: {problem}")
    print("all is well" if not findings["problems"] else f"{len(findings['problems'])} problem(s)")


def _check_workspace(workspace: Path, problems: list[str]) -> dict[str, Any]:
    """Whether files can be written there, really tried, and how much room there is."""
    if is_remote(workspace):
        try:
            reach(workspace)
        except InputError as error:
            problems.append(f"workspace {error}")
            return {"path": str(workspace), "state": "not reached", "free_bytes": None}
        made = "made" if (workspace / "stages").is_dir() else "not made yet"
        return {"path": str(workspace), "state": f"written and read, {made}", "free_bytes": None}
    existing = workspace.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"csm")
    except OSError as error:
        problems.append(f"workspace {workspace}: cannot be written ({error.strerror}): choose another folder")
        return {"path": str(workspace), "state": "not writable", "free_bytes": None}
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES:
        problems.append(f"workspace {workspace}: only {free / 2**30:.1f} GiB free: make room or choose another disk")
    state = "made" if (workspace / "stages").is_dir() else "not made yet"
    return {"path": str(workspace), "state": f"{state}, {free / 2**30:.0f} GiB free", "free_bytes": free}


def _host() -> str:
    return os.uname().nodename


def _check_ray(
    workspace: Path, address: str, tracking: Address, versions: dict[str, str | None], problems: list[str]
) -> dict[str, Any]:
    """Join or start Ray and run one task; on a cluster look at every node."""
    import ray

    from cluster.session import session

    started = time.monotonic()
    try:
        with session(address):
            joined = time.monotonic()
            host = ray.get(ray.remote(num_cpus=0)(_host).remote())  # no CPU: they may all be taken, or not have joined
            first = time.monotonic()
            resources = ray.cluster_resources()
            nodes = sum(node["Alive"] for node in ray.nodes())
            python = {"python": platform.python_version()}
            each = [] if address == "local" else check_cluster(workspace, tracking, {**python, **versions}, problems)
    except InputError as error:
        problems.append(str(error))
        return {"address": address, "state": "not reached"}
    return {
        "address": address,
        "state": f"{nodes} node(s), {resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU; first task after "
        f"{first - joined:.1f} s on {host}",
        "nodes": nodes,
        "cpus": resources.get("CPU", 0),
        "gpus": resources.get("GPU", 0),
        "connect_seconds": round(joined - started, 2),
        "first_task_seconds": round(first - joined, 2),
        "each": each,
    }


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
