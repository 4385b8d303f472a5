import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from cluster import session as module
from cluster.resources import Cap
from cluster.session import require_answer, session, share
from csm.errors import InputError


@pytest.fixture
def listener():
    """A port that takes connections; ``listener.answer`` is what it says, or None to say nothing."""

    class Listener:
        def __init__(self):
            self.answer = None
            self.socket = socket.create_server(("127.0.0.1", 0))
            self.port = self.socket.getsockname()[1]
            self.taken = []
            threading.Thread(target=self.serve, daemon=True).start()

        def serve(self):
            while True:
                try:
                    connection, _ = self.socket.accept()
                except OSError:
                    return
                self.taken.append(connection)
                if self.answer is not None:
                    connection.sendall(self.answer)

    taken = Listener()
    yield taken
    taken.socket.close()
    for connection in taken.taken:
        connection.close()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_listens_is_refused_at_once(form):
    address = form.format(closed_port())
    started = time.monotonic()
    with (
        pytest.raises(InputError, match=rf"--address {address}: nothing answers at 127\.0\.0\.1 .*use --address local"),
        session(address),
    ):
        pass
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


def test_an_unknown_host_is_refused():
    with pytest.raises(InputError, match=r"nothing answers at no-such-host\.invalid port 6379"):
        require_answer("no-such-host.invalid:6379")


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_port_that_takes_connections_and_says_nothing_is_refused(form, listener, monkeypatch):
    assert module.CONNECT_SECONDS <= 5  # connecting and answering may each take as long
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    with pytest.raises(InputError, match=r"nothing answers .*timed out"):
        require_answer(form.format(listener.port))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_a_server_of_another_kind_is_refused(answer, listener):
    listener.answer = answer or b"\n"
    with pytest.raises(InputError, match="is not Ray"):
        require_answer(f"127.0.0.1:{listener.port}")


@pytest.mark.parametrize(
    "address",
    ["nonsense", "127.0.0.1", "", "ray://", "ray://host", "127.0.0.1:port", "127.0.0.1:99999", ":6379", "host:", "local:"],
)
def test_a_malformed_address_is_refused_with_the_forms_that_are_allowed(address):
    with pytest.raises(
        InputError, match=rf"^--address {re.escape(address)}: expected local, auto, HOST:PORT or ray://HOST:PORT$"
    ):
        require_answer(address)


@pytest.mark.parametrize(
    ("mode", "advice"), [("token", "start one with"), ("", "if it asks for a token .*, export RAY_AUTH_MODE=token; else")]
)
def test_a_cluster_that_cannot_be_joined_may_ask_for_a_token(monkeypatch, mode, advice):
    def refuse(**options):
        raise ConnectionError("Failed to connect.")

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(module, "require_answer", lambda address: None)
    monkeypatch.setattr(ray, "init", refuse)
    said = rf"^--address h:6379: no Ray cluster can be joined there \(Failed to connect.\); {advice}"
    with pytest.raises(InputError, match=said), session("h:6379"):
        pass


@pytest.mark.ray
def test_a_running_cluster_is_joined_and_left_again(ray_address):
    with session(ray_address):
        assert ray.is_initialized()
        assert ray.cluster_resources()["CPU"] == 2
    assert not ray.is_initialized()
    require_answer(ray_address)  # it runs on


BOTH = """
import sys
from cluster.session import session

with session("local", cpus=1):
    pass

import ray

@ray.remote(num_cpus=0)
class Actor:
    def answer(self):
        return 42

with session(sys.argv[1]):
    print(ray.get(Actor.remote().answer.remote()))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_without_a_token_is_joined_after_a_ray_of_ones_own_which_has_one(ray_address):
    command = [sys.executable, "-c", BOTH, ray_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "42\n", done.stderr


AUTO = """
import functools
import os
import sys
import ray
from ray._private import services
from cluster.session import session

@ray.remote(num_cpus=0)
class Actor:
    def answer(self):
        return 42

services.find_gcs_addresses = functools.cache(lambda: {sys.argv[1]})  # other clusters may run on this machine
with session("auto"):
    print(ray.get(Actor.remote().answer.remote()))
assert "RAY_AUTH_MODE" not in os.environ
"""


def joined_by_auto(address, home):
    """What a process with this home folder prints that finds the cluster at ``address``."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    command = [sys.executable, "-c", AUTO, address]
    done = subprocess.run(
        command, env=environment | {"HOME": str(home)}, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout, done.stderr


@pytest.mark.ray
def test_auto_brings_no_token_to_a_cluster_without_one(ray_address, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    stdout, stderr = joined_by_auto(ray_address, tmp_path)
    assert stdout == "42\n", stderr


@pytest.mark.slow
@pytest.mark.ray
def test_auto_brings_the_token_that_a_cluster_asks_for():
    own = """
import ray
from cluster.session import session
with session("local", cpus=1):
    print(ray.get_runtime_context().gcs_address, flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", own], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
        try:
            stdout, stderr = joined_by_auto(head.stdout.readline().strip(), Path.home())
        finally:
            head.communicate("\n", timeout=60)
    assert stdout == "42\n", stderr


@pytest.mark.ray
def test_an_error_in_the_block_leaves_the_cluster_too(ray_address):
    with pytest.raises(KeyError), session(ray_address):
        raise KeyError
    assert not ray.is_initialized()


@pytest.mark.ray
def test_the_cap_holds_for_the_session(ray_address):
    with session(ray_address, cap=Cap(cpus=0.5), namespace="csm-test"):
        assert share()["CPU"] == 0.5
        assert ray.get_runtime_context().namespace == "csm-test"
    with session(ray_address):
        assert share()["CPU"] == 2


OWN = """
import ray
from cluster.session import session
with session("local", cpus=1):
    print(ray.cluster_resources()["CPU"], flush=True)
    input()
print(ray.is_initialized())
"""


@pytest.mark.slow
@pytest.mark.ray
def test_local_starts_a_ray_of_its_own_and_stops_it(processes):
    """In a process of its own, whose descendants are then all Ray's."""
    process = subprocess.Popen([sys.executable, "-c", OWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "1.0\n"
        started = processes.descendants(process.pid)
        assert any("raylet" in processes.name(pid) for pid in started)
        assert process.communicate("\n", timeout=60)[0] == "False\n"
        assert process.returncode == 0
    finally:
        process.kill()
    assert processes.left(started, 15) == []


@pytest.mark.ray
def test_ctrl_c_wakes_who_waits_also_after_polars_was_imported():
    script = """
import os, queue, signal, threading
import polars
from cluster.session import session

try:
    with session("local", cpus=1):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        queue.Queue().get()
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


@pytest.mark.slow
def test_a_handler_of_sigterm_outlives_the_start_of_ray():
    """Ray's own would abort the process; csm stops as after Ctrl-C."""
    script = """
import os, signal
from cluster.session import session

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
try:
    with session("local", cpus=1):
        os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_garbage_of_another_thread_does_not_end_the_process_while_ray_shuts_down():
    """Every collection frees a reference to an object of Ray; without our guard the process ends here, without a word."""
    script = """
import gc, threading, time
import ray
from cluster.session import session

def litter():
    while references:
        cycle = [references.pop()]
        cycle.append(cycle)
        time.sleep(1e-5)

with session("local", cpus=1):
    one = ray.put(1)
    references = [ray.ObjectRef(one.binary()) for _ in range(20_000)]
    thread = threading.Thread(target=litter)
    gc.freeze()
    gc.set_threshold(5)
    thread.start()
    time.sleep(0.05)
assert gc.isenabled()
thread.join()
print("lives")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr
