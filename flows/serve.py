"""serve: a finished model over HTTP, by MLflow's scoring server, with limits on what a request may hold."""

import json
import math
import os
import signal
import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from csm.calibrated import CalibratedClassifier
from csm.errors import InputError
from flows.models import open_model
from flows.progress import say

NUMBER_BYTES = 6  # of a pixel's number in JSON, "255, ", with its share of brackets
REST_BYTES = 2**16  # of a request beside its numbers
REASON_CHARACTERS = 500


def serve(model: str, host: str, port: int, max_batch: int, max_bytes: int | None, tracking_uri: str | None = None) -> None:
    """Answer requests until SIGTERM or Ctrl-C.

    POST /invocations takes ``{"inputs": images}`` as JSON, nested lists (N, H, W, C) of whole numbers in 0..255, and gives
    ``{"predictions": probabilities}``; GET /health and /ping answer 200. What cannot be used is 400, a body that is too large 413, each
    with one line in JSON.

    Args:
        model: see ``open_model``.
        host, port: to listen on.
        max_batch: images of a request.
        max_bytes: of a request's body; None: what ``max_batch`` images take.
        tracking_uri: see ``open_model``.

    Raises:
        InputError: there is no such model, or the address cannot be listened on.
    """
    classifier = open_model(model, tracking_uri)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # below 0: no such host
        raise InputError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another --port") from None
    with listener:
        import uvicorn  # with MLflow's server, seconds to import

        limit = max_bytes or max_batch * math.prod(classifier.spec.shape) * NUMBER_BYTES + REST_BYTES
        server = uvicorn.Server(uvicorn.Config(scoring_app(classifier, max_batch, limit), log_level="warning"))
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends on them, then raises them again for whoever else listens
            signal.signal(number, lambda *_: None)
        name = f"[{host}]" if ":" in host else host
        say(f"{model} on http://{name}:{port}/invocations, at most {max_batch} images a request  (Ctrl-C stops it)")
        server.run(sockets=[listener])


def scoring_app(model: CalibratedClassifier, max_batch: int, max_bytes: int) -> Any:
    """MLflow's scoring server of ``model`` as an ASGI application, within limits."""
    from mlflow.pyfunc.scoring_server import init

    return _Guarded(init(_Served(model, max_batch)), max_bytes)


class _Served:
    """The model as the scoring server sees it.

    It tells no schema: by that, MLflow would make 0.5 or 0.99 of images that were scaled to 0..1 into 0, without a word.
    """

    metadata = SimpleNamespace(get_input_schema=lambda: None)

    def __init__(self, model: CalibratedClassifier, max_batch: int) -> None:
        self.model = model
        self.max_batch = max_batch

    def predict(self, data: Any) -> np.ndarray:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import BAD_REQUEST

        try:
            return self.model.predict(self._images(data)).numpy()
        except InputError as error:
            raise MlflowException(str(error), error_code=BAD_REQUEST) from None

    def _images(self, data: Any) -> torch.Tensor:
        if not isinstance(data, np.ndarray):
            raise InputError('expected JSON {"inputs": images}, nested lists of the shape (N, height, width, channels)')
        if data.ndim == 4 and len(data) > self.max_batch:
            raise InputError(f"{len(data)} images in one request; at most {self.max_batch} are taken (csm serve --max-batch)")
        if data.dtype.kind not in "iuf" or not ((data >= 0) & (data <= 255) & (data == np.floor(data))).all():
            raise InputError("images: expected whole numbers in 0..255, pixels as they come from a file")
        return torch.from_numpy(data.astype(np.uint8))


class _Guarded:
    """ASGI middleware: a body above ``limit`` bytes is refused with 413, and errors are one line of JSON without input or traceback."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = await self._read(scope, receive)
        if body is None:
            line = f"the request is larger than {self.limit} bytes (csm serve --max-bytes); send fewer images at once"
            await _answer(send, 413, {"error_code": "REQUEST_TOO_LARGE", "message": line}, close=True)
            return
        if b"content-type" not in dict(scope["headers"]):  # without which MLflow fails
            scope = {**scope, "headers": [*scope["headers"], (b"content-type", b"application/json")]}
        ahead = [{"type": "http.request", "body": body, "more_body": False}]
        failed: list[Any] = []  # messages of an answer that tells of an error

        async def replay() -> Any:
            return ahead.pop() if ahead else await receive()

        async def tell(message: Any) -> None:
            if failed or (message["type"] == "http.response.start" and message["status"] >= 400):
                failed.append(message)
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    text = b"".join(part.get("body", b"") for part in failed)
                    await _answer(send, failed[0]["status"], _one_line(text))
            else:
                await send(message)

        await self.app(scope, replay, tell)

    async def _read(self, scope: Any, receive: Any) -> bytes | None:
        """The body; None if it is too large, of which as much again is read, so that most clients get to read the answer."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > 2 * self.limit:
            return None
        body, seen = bytearray(), 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            seen += len(part)
            if seen <= self.limit:
                body += part
            if not message.get("more_body") or seen > 2 * self.limit:  # a client that is gone has no more either
                return bytes(body) if seen <= self.limit else None


def _one_line(text: bytes) -> dict[str, str]:
    """What MLflow says of an error, without the images that it repeats and the traceback."""
    try:
        value = json.loads(text)
        code, message = value.get("error_code", "ERROR"), str(value.get("message") or value["detail"])
    except (ValueError, KeyError, AttributeError):
        code, message = "ERROR", text.decode(errors="replace")
    reason = (
        message.rpartition("\nError: ")[2] if message.startswith("Failed to predict data") else message.partition("\nInput:")[0]
    )
    return {"error_code": code, "message": " ".join(reason.split())[:REASON_CHARACTERS]}


async def _answer(send: Any, status: int, value: dict[str, str], close: bool = False) -> None:
    content = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if close:  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
