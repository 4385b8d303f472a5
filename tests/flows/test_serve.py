"""`csm serve`: a real server in a thread, and once as a user starts it."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn

from csm.calibrated import load_calibrated
from csm.errors import InputError
from flows import serve
from flows.serve import scoring_app
from tests.ports import free_port

JSON = {"content-type": "application/json"}
MAX_BATCH, MAX_BYTES = 4, 5000


@pytest.fixture(scope="module")
def model(modelled):
    return load_calibrated(modelled / "model")


@pytest.fixture(scope="module")
def ask(model):
    """``ask(path, body, headers)`` gives status and text; GET without a body."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(scoring_app(model, MAX_BATCH, MAX_BYTES), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def request(path: str, body: Any = None, headers: dict[str, str] | None = JSON) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=60)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.strip().startswith("{") else text

    yield request
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)


def body(inputs, key="inputs"):
    return json.dumps({key: inputs}).encode()


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health(ask, path):
    assert ask(path)[0] == 200


@pytest.mark.parametrize("headers", [JSON, None])
@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_probabilities_over_http_are_the_model_s(ask, model, images, key, headers):
    expected = model.predict(torch.from_numpy(images)).numpy()
    status, answer = ask("/invocations", body(images.tolist(), key), headers)
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], expected, rtol=0, atol=1e-6)


def test_a_body_in_chunks(ask, images):
    whole = body(images.tolist())
    assert ask("/invocations", iter([whole[:100], whole[100:]]))[0] == 200


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda images: np.tile(images, (2, 1, 1, 1)).tolist(), "6 images in one request; at most 4 are taken (csm serve --max-batch)"),
        (lambda images: images[:, :4].tolist(), "images: expected uint8 (N, 8, 8, 1), got uint8 (3, 4, 8, 1)"),
        (lambda images: images[0].tolist(), "images: expected uint8 (N, 8, 8, 1), got uint8 (8, 8, 1)"),
        (lambda images: (images / 255).tolist(), "images: expected whole numbers in 0..255, pixels as they come from a file"),
        (lambda images: (images.astype(int) + 256).tolist(), "images: expected whole numbers in 0..255, pixels as they come from a file"),
        (lambda images: (-images.astype(int)).tolist(), "images: expected whole numbers in 0..255, pixels as they come from a file"),
        (lambda images: "cat.png", "images: expected whole numbers in 0..255, pixels as they come from a file"),
        (lambda images: [[1, 2], [3]], "Invalid input. setting an array element with a sequence."),
        (lambda images: [], 'expected JSON {"inputs": images}, nested lists of the shape (N, height, width, channels)'),
        (lambda images: {"x": [1]}, 'expected JSON {"inputs": images}, nested lists of the shape (N, height, width, channels)'),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used_are_400_in_one_line(ask, images, wrong, said):
    status, answer = ask("/invocations", body(wrong(images)))
    assert (status, set(answer)) == (400, {"error_code", "message"})
    assert answer["message"].startswith(said)
    assert "\n" not in answer["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[1]", JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b'{"pictures": [1]}', JSON, 400),
        (b"a,b\n1,2", {"content-type": "text/csv"}, 400),
        (b"\x89PNG", {"content-type": "image/png"}, 415),
    ],
)
def test_what_is_no_json_of_images(ask, content, headers, status):
    found, answer = ask("/invocations", content, headers)
    assert (found, set(answer)) == (status, {"error_code", "message"})
    assert len(answer["message"]) <= 500


def test_an_error_does_not_repeat_what_was_sent(ask):
    status, answer = ask("/invocations", b"{" + b"secret " * 500)
    assert status == 400
    assert "secret" not in answer["message"]


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 50 * MAX_BYTES])
def test_a_body_that_is_too_large_is_413(ask, size):
    status, answer = ask("/invocations", b"x" * size)
    assert (status, answer["error_code"]) == (413, "REQUEST_TOO_LARGE")
    assert answer["message"].startswith("the request is larger than 5000 bytes (csm serve --max-bytes)")
    assert ask("/health")[0] == 200


def test_a_body_in_chunks_that_is_too_large_is_413(ask):
    assert ask("/invocations", iter([b"x" * 1000] * 6))[0] == 413


def test_a_path_that_is_none(ask):
    assert ask("/nope") == (404, {"error_code": "ERROR", "message": "Not Found"})


def test_an_address_that_is_taken_is_one_line(modelled):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as refused:
            serve.serve(str(modelled), "127.0.0.1", port, 4, None)
    assert str(refused.value) == (
        f"--host 127.0.0.1 --port {port}: cannot listen there (Address already in use); choose another --port"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(modelled, images, number):
    port = free_port()
    command = [sys.executable, "-m", "flows.cli", "serve", "--model", str(modelled), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 200
        while True:
            assert time.monotonic() < end
            assert server.poll() is None
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/invocations", body(images.tolist()), JSON)
                break
            except OSError:
                time.sleep(0.2)
        assert connection.getresponse().status == 200
        connection.close()
        server.send_signal(number)
        _, err = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    assert err == f"{modelled} on http://127.0.0.1:{port}/invocations, at most 256 images a request  (Ctrl-C stops it)\n"
