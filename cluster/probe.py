"""What every node of a cluster is, and whether it can do what a run needs: each is really tried, on each node."""

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from csm.errors import InputError
from csm.locations import is_remote, location, reach, remove

ANSWER_SECONDS = 60.0  # for a worker process to start on a node and to look around
SEEN_SECONDS = 5.0  # for a file to be seen elsewhere
SERVER_SECONDS = 5.0


@dataclass
class Node:
    """A node as the cluster knows it, and what was found there; the texts of what failed are "" where all is well."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float
    seconds: float = 0.0
    error: str = ""
    storage: str = ""
    tracking: str = ""
    cuda: str = ""
    auth: str = ""
    devices: list[str] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.host} ({self.address})"


def nodes() -> list[Node]:
    """The nodes that are alive. Needs a Ray session."""
    return [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def look(found: Sequence[Node], packages: Sequence[str], server: str = "") -> None:
    """Fill in versions, GPUs, authentication and whether the tracking ``server`` answers, of every node.

    Args:
        packages: whose versions are asked for.
        server: ``SCHEME://HOST[:PORT]`` without credentials; "" for none.
    """
    looked = _everywhere(found, lambda node: (facts, (packages, server, node.gpus)))
    for node, (answer, error, seconds) in zip(found, looked, strict=True):
        node.seconds, node.error = seconds, error
        for name, value in (answer or {}).items():
            setattr(node, name, value)


def share(found: Sequence[Node], folder: Path) -> str:
    """Let this process and every node that answered write a file into ``folder`` and read those of all the others.

    Most are taken to be right where not all see the same, so that one odd node is named alone: what is wrong with those at odds with them
    is put into ``storage`` of the nodes. ``folder`` is made for it, and removed everywhere; its parent must be there.

    Returns:
        What is wrong with this process's own storage, "" if nothing.
    """
    able, place, own = [node for node in found if not node.error], str(folder), ""
    names = {"driver": "this machine", **{node.id: node.label for node in able}}
    try:
        try:
            write(place, "driver")
        except (OSError, InputError) as error:
            own = f"cannot write: {_line(error)}"
        for node, (_, error, _) in zip(able, _everywhere(able, lambda node: (write, (place, node.id))), strict=True):
            node.storage = error and f"cannot write: {error}"
        readers = [node for node in able if not node.storage]
        written = [*([] if own else ["driver"]), *(node.id for node in readers)]
        reads = _everywhere(readers, lambda node: (missing, (place, written)))
        unseen = {} if own else {"driver": missing(place, written)}
        unseen |= {node.id: answer or [] for node, (answer, _, _) in zip(readers, reads, strict=True)}
        agreed = _agreed(unseen)
        own = own or _sight("driver", unseen, agreed, names)
        for node, (_, error, _) in zip(readers, reads, strict=True):
            node.storage = f"cannot read: {error}" if error else _sight(node.id, unseen, agreed, names)
    finally:
        _everywhere(able, lambda node: (clean, (place,)))
        clean(place)
    return own


def facts(packages: Sequence[str], server: str, gpus: float) -> dict[str, Any]:
    """Of this process's machine: versions, GPUs, whether Ray asks for a token here, and what is wrong with CUDA and ``server``."""
    return {
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}, "code": code()},
        "devices": _devices(),
        "auth": os.environ.get("RAY_AUTH_MODE", "disabled").lower(),
        "cuda": _cuda() if gpus else "",
        "tracking": answers(server) if server else "",
    }


def installed(package: str) -> str | None:
    """Version of ``package`` without the suffix of its build, as in 2.13.0+cpu; None: it is not installed."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def code() -> str:
    """Digest of this project's own sources."""
    digest, root = hashlib.blake2b(digest_size=4), Path(__file__).parents[1]
    for file in sorted(path for package in ("csm", "cluster", "flows") for path in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def answers(server: str) -> str:
    """What is wrong with the tracking server or database at ``SCHEME://HOST[:PORT]``, asked from here; "" if it answers."""
    parts = urlsplit(server)
    try:
        if parts.scheme not in ("http", "https"):
            port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}[parts.scheme.partition("+")[0]]
            socket.create_connection((parts.hostname or "", port), timeout=SERVER_SECONDS).close()
            return ""
        with urllib.request.urlopen(f"{server}/health", timeout=SERVER_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in (401, 403) else f"answers {error.code} {error.reason}"  # it is there, and asks who we are
    except OSError as error:
        return str(getattr(error, "reason", error))


def write(folder: str, name: str) -> None:
    """Write the file ``name``, which holds its name, into ``folder``, which is made if its parent is there."""
    place = location(folder)
    if is_remote(place):
        reach(place)
    else:
        place.mkdir(exist_ok=True)
    (place / name).write_bytes(name.encode())


def missing(folder: str, names: Sequence[str]) -> list[str]:
    """Those of the files ``names`` of ``folder`` that cannot be read here, also after some seconds."""
    place, left = location(folder), list(names)
    end = time.monotonic() + SEEN_SECONDS
    while left := [name for name in left if not _holds(place / name, name)]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return left


def clean(folder: str) -> None:
    """Remove ``folder``, whoever made it; another may be at it too."""
    with suppress(Exception):
        remove(location(folder))


def _agreed(unseen: Mapping[str, Sequence[str]]) -> list[str]:
    """Of all in ``unseen``, whose files each one does not see, most that see the same; this process comes first."""
    blind = [(one, other) for one, others in unseen.items() for other in others if other in unseen]
    apart: dict[str, set[str]] = {one: set() for one in unseen}
    for one, other in blind:
        apart[one].add(other)
        apart[other].add(one)
    middle = min(unseen, key=lambda one: len(apart[one]), default="")
    return [one for one in unseen if one not in apart[middle]]


def _sight(name: str, unseen: Mapping[str, Sequence[str]], agreed: Sequence[str], names: Mapping[str, str]) -> str:
    """What is wrong with the storage of ``name``: what is between it and those that are ``agreed``."""
    lost = [names[one] for one in agreed if one in unseen[name]]
    blind = [names[one] for one in agreed if name in unseen[one]]
    sees = [f"does not see what {_some(lost)} wrote"] if lost else []
    seen = [f"{_some(blind)} does not see what it wrote"] if blind else []
    return ", and ".join([*sees, *seen])


def _holds(path: Path, name: str) -> bool:
    try:
        return path.read_bytes() == name.encode()
    except Exception:  # every store has errors of its own
        return False


def _devices() -> list[str]:
    """Names of the GPUs that NVIDIA's driver knows here."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    asked = subprocess.run([program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return asked.stdout.splitlines() if asked.returncode == 0 else []


def _cuda() -> str:
    """What keeps torch from the GPUs here, tried in a process of its own, from which Ray hides none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    tried = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["torch cannot be imported"])[-1]


def _everywhere(
    found: Sequence[Node], call: Callable[[Node], tuple[Callable[..., Any], tuple[Any, ...]]]
) -> list[tuple[Any, str, float]]:
    """Run ``call(node)``, a function and its arguments, on every node at once: its result, what went wrong or "", and seconds."""
    started, pending = time.monotonic(), []
    for node in found:
        function, arguments = call(node)
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        # No CPU is asked for: a node that is busy, or computes nothing, answers too.
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned)(function)
        pending.append(task.remote(*arguments))
    results: list[tuple[Any, str, float]] = []
    for task in pending:
        try:
            left = max(0.1, started + ANSWER_SECONDS - time.monotonic())
            results.append((ray.get(task, timeout=left), "", round(time.monotonic() - started, 2)))
        except GetTimeoutError:
            results.append((None, f"no answer within {ANSWER_SECONDS:.0f} s", ANSWER_SECONDS))
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            results.append((None, _line(cause), round(time.monotonic() - started, 2)))
    return results


def _line(error: BaseException) -> str:
    """The last line of ``error``, where a traceback says what it was; for a refusal by the system, its reason and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
