"""An S3 of the tests' own that answers errors while a file is there: ``python -m tests.hosts.store IP PORT BUCKET FOLDER``.

Below FOLDER: ``written`` lists the keys that were put, each behind the time (seconds since 1970), and ``failing`` is that file.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.test import Client


def main(ip: str, port: int, bucket: str, folder: Path) -> None:
    """Serve until killed."""
    s3 = DomainDispatcherApplication(create_backend_app)
    Client(s3).put(f"/{bucket}")
    log = (folder / "written").open("a", buffering=1, encoding="utf-8")

    def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if (folder / "failing").exists():
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"]
        if request["REQUEST_METHOD"] == "PUT":
            log.write(f"{time.time():.2f} {request['PATH_INFO']}\n")
        return s3(request, start)

    run_simple(ip, port, answer, threaded=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
