"""doctor, on a cluster: every node, its versions, GPUs, storage and way to the tracking server, and what to do about each problem."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.probe import Node, code, look, nodes, share
from csm.locations import is_remote
from flows.tracking_address import Address


def check_cluster(
    workspace: Path, tracking: Address, versions: Mapping[str, str | None], problems: list[str]
) -> list[dict[str, Any]]:
    """What every node of the cluster is and found; adds to ``problems``. Needs a Ray session.

    Args:
        workspace: where nodes write and read, or would if it were made.
        tracking: the store that they ask, if it is a server or a database.
        versions: of this process, by package, and "python".
    """
    found = nodes()
    look(found, [name for name in versions if name != "python"], _without_secrets(tracking))
    if wrong := share(found, _trial(workspace)):
        problems.append(f"workspace {workspace}: this machine {wrong}: {_storage_hint(workspace)}")
    if not any(node.cpus for node in found):
        problems.append(
            "no node has a CPU to work with: the workers have not joined; wait until `ray status` lists them, or see why they do not "
            "(docs/cluster.md, When something fails)"
        )
    problems += [f"node {node.label}: {problem}" for node in found for problem in _problems(node, workspace, tracking)]
    problems += _differences(found, {**versions, "code": code()})
    if open_nodes := [node.label for node in found if not node.error and node.auth != "token"]:
        problems.append(
            f"authentication is off on {', '.join(open_nodes)}: whoever reaches the cluster's ports runs programs there; start Ray with "
            "RAY_AUTH_MODE=token, as ray_cluster.yaml does (docs/cluster.md, Security)"
        )
    return [asdict(node) for node in found]


def node_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each node."""
    lines = []
    for node in found:
        parts = [f"{node['cpus']:g} CPU, {node['gpus']:g} GPU{_devices(node['devices'])}"]
        if not node["error"]:
            parts += [f"python {node['versions']['python']}", f"storage {'FAILED' if node['storage'] else 'ok'}"]
            parts += ["tracking FAILED"] if node["tracking"] else []
        parts.append("FAILED" if node["error"] else f"answered after {node['seconds']:.1f} s")
        lines.append(f"{'node':<12}{node['host']} ({node['address']}): {'; '.join(parts)}")
    return lines


def _problems(node: Node, workspace: Path, tracking: Address) -> list[str]:
    if node.error:
        return [
            f"a task there fails ({node.error}): install csm there as it is here (ray up ray_cluster.yaml), or look at Ray's logs in "
            "/tmp/ray/session_latest/logs"
        ]
    found = []
    if node.storage:
        found.append(f"workspace {workspace}: {node.storage}: {_storage_hint(workspace)}")
    if node.tracking:
        found.append(
            f"tracking store {tracking}: does not answer ({node.tracking}): let it listen on an address that the nodes reach "
            "(mlflow server --host), and open its port in the firewall"
        )
    if node.cuda:
        found.append(f"torch cannot use its GPU ({node.cuda}): install the driver and a CUDA build of torch there")
    return found


def _storage_hint(workspace: Path) -> str:
    if is_remote(workspace):
        return "give it the rights to the store (credentials in its environment, or an instance profile)"
    return "mount one shared folder at the same path on every node, writable for the account that runs Ray, or use s3://BUCKET/FOLDER"


def _differences(found: Sequence[Node], here: Mapping[str, str | None]) -> list[str]:
    """A line for each package whose version on some nodes is not the one of this process."""
    lines = []
    for name, own in here.items():
        other: dict[str, list[str]] = {}
        for node in found:
            if not node.error and node.versions.get(name) != own:
                other.setdefault(str(node.versions.get(name) or "missing"), []).append(node.label)
        if other:
            there = "; ".join(f"{version} on {', '.join(labels)}" for version, labels in other.items())
            what, mend = ("csm's own sources", "the same commit") if name == "code" else (f"package {name}", "the same version")
            lines.append(
                f"{what if name != 'python' else 'python'}: {own or 'missing'} here, {there}: install {mend} everywhere "
                "(ray up ray_cluster.yaml installs this folder's)"
            )
    return lines


def _trial(workspace: Path) -> Path:
    """A new folder in ``workspace``, or where it would be made."""
    name = f".csm-doctor-{uuid.uuid4().hex}"
    if is_remote(workspace):
        return workspace / name
    existing = workspace.absolute()
    while not existing.is_dir():
        existing = existing.parent
    return existing / name


def _without_secrets(tracking: Address) -> str:
    """The part of the address that the nodes are given; "" if there is nothing to reach."""
    if tracking.is_local:
        return ""
    parts = urlsplit(tracking.uri)
    path = parts.path.rstrip("/") if tracking.is_server else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"


def _devices(names: Sequence[str]) -> str:
    counted = {name: names.count(name) for name in names}
    return f" ({', '.join(f'{count} x {name}' for name, count in counted.items())})" if counted else ""
