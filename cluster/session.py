"""Connecting to Ray."""

import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import ray
from ray._raylet import AuthenticationTokenLoader, Config

from cluster.resources import Cap
from csm.errors import InputError
from csm.locations import is_remote, store

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200 * 2**20  # only receipts and settings pass through it; images never do
CONNECT_SECONDS = 5.0
NO_CAP = Cap()
_caps = [NO_CAP]  # of the session that is open, last


@contextmanager
def session(address: str = "local", cpus: int | None = None, cap: Cap = NO_CAP, namespace: str | None = None) -> Iterator[None]:
    """Connect to Ray for the length of the block.

    Args:
        address: ``local`` starts a Ray of its own on this machine and stops it afterwards; ``auto`` finds a running one; ``HOST:PORT``
            and ``ray://HOST:PORT`` name one.
        cpus: CPUs of a local Ray; None for all of this machine.
        cap: what the run may take of it, see ``share``.
        namespace: where Ray keeps the names that the run gives; None: one of its own.

    Raises:
        InputError: nothing answers at ``address``.
    """
    with _environment_kept() if address in ("local", "auto") else nullcontext(), _connected(address, cpus, cap, namespace):
        yield


@contextmanager
def _connected(address: str, cpus: int | None, cap: Cap, namespace: str | None) -> Iterator[None]:
    _quieten()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address == "local":
        # Ray Data's own actors set off an error line about their constructor arguments (ray#53727) at every start. On a cluster the
        # native log stays as it is: there it alone says that the connection to the head was lost.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # One machine is not preempted, and a group of small trainings should not wait two seconds to be found finished.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        with _native_stderr_muted():
            ray.init(
                address="local",
                namespace=namespace,
                num_cpus=cpus or len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    else:
        require_answer(address)
        try:
            found = _without_token() if address == "auto" else None
            ray.init(address=found or address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = _HINT if os.environ.get("RAY_AUTH_MODE") == "token" else f"{_TOKEN_HINT}; else {_HINT}"
            raise InputError(f"--address {address}: no Ray cluster can be joined there ({reason}); {hint}") from None
    # Ray's own for SIGTERM aborts the process. That of polars for SIGINT, from its import on, lets Python go on waiting (SA_RESTART).
    for number, handler in handlers.items():
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)
    _caps.append(cap)
    try:
        yield
    finally:
        _caps.pop()
        _leave()


def share() -> dict[str, float]:
    """Resources of the cluster that this run may take: all, up to the cap of the session."""
    return _caps[-1].of(ray.cluster_resources())


def records_in(directory: Path) -> dict[str, Any]:
    """The arguments by which Ray Train and Ray Tune keep their own records in ``directory``, which may be on a store."""
    if not is_remote(directory):
        return {"storage_path": str(directory.absolute())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {
        "storage_path": str(directory).partition("://")[2],
        "storage_filesystem": PyFileSystem(FSSpecHandler(store(directory))),
    }


# How every gRPC conversation begins (RFC 9113, section 3.4): both sides send a SETTINGS frame, which is type 4.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = b"\x04"
_HINT = "start one with `ray start --head`, or use --address local"
_TOKEN_HINT = "if it asks for a token (a head that was started where ~/.ray/auth_token is does), export RAY_AUTH_MODE=token"


def require_answer(address: str) -> None:
    """Raise ``InputError`` within seconds if nobody listens at ``address``: Ray itself would wait for minutes."""
    if address in ("local", "auto"):
        return
    parsed = urlparse(address if "://" in address else f"gcs://{address}")
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise InputError(f"--address {address}: expected local, auto, HOST:PORT or ray://HOST:PORT")
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return  # the conversation is encrypted
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise InputError(f"--address {address}: nothing answers at {host} port {port} ({error}); {_HINT}") from None
    if answer[3:4] != _HTTP2_SETTINGS:
        raise InputError(f"--address {address}: what answers at {host} port {port} is not Ray; {_HINT}")


def _without_token() -> str | None:
    """HOST:PORT of the cluster that ``auto`` finds if that can be joined without a token; None: Ray has to find it, and the token.

    Ray joins what it finds by itself with the token of ~/.ray/auth_token, if there is one. A Ray of one's own (``local``) leaves one there,
    and a cluster that was started before, without, loses the actors of whoever comes with a token.

    Raises:
        ConnectionError: no cluster is found.
    """
    if "RAY_AUTH_MODE" in os.environ or os.environ.get("RAY_ADDRESS"):
        return None  # Ray does what they say
    import grpc
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    found = canonicalize_bootstrap_address("auto")
    with grpc.insecure_channel(found) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=CONNECT_SECONDS)
        except grpc.RpcError:
            return None
    return str(found)


# What a session sets in the environment, or Ray in it: in the token mode that Ray turns on no cluster without a token can be joined.
_OF_RAY = ("RAY_AUTH_MODE", "RAY_BACKEND_LOG_LEVEL", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")


@contextmanager
def _environment_kept() -> Iterator[None]:
    before = {name: os.environ[name] for name in _OF_RAY if name in os.environ}
    try:
        yield
    finally:
        for name in _OF_RAY:
            os.environ.pop(name, None)
        os.environ.update(before)
        Config.initialize("")  # Ray reads them once
        AuthenticationTokenLoader.instance().reset_cache()  # with a token in mind it goes on asking for one


def _leave() -> None:
    """Shut Ray down with no garbage left to collect: whatever thread finds one of Ray's references in it meanwhile ends the process."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        gc.collect()  # Ray has a thread that collects on demand, whatever gc.disable says
    finally:
        try:
            ray.shutdown()
        finally:
            if was_enabled:
                gc.enable()


@contextmanager
def _native_stderr_muted() -> Iterator[None]:
    """Drop what native code prints to stderr: ray.init announces the log level that ``_quieten`` sets. Exceptions still come."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def _quieten() -> None:
    """Ray's own progress bars and chatter give way to ours; warnings and errors stay."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Ray Data's thread that counts usage goes on after Ray is shut down; a count in that moment ends the process, without a word.
    os.environ["RAY_DATA_USAGE_DISABLED"] = "1"
    # Tune: no files for TensorBoard, no state of its own beside ours, Ctrl-C is ours, and what fails is told by `cluster.tuning`.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1e9")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # most reports only tell of epochs
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints even with verbose=0
    # A group that does not get its workers in time is sized anew: a node may be gone. Ray's minute is long where one is.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
