"""A small HTTP server that speaks MLflow's REST, and can be down, slow or refuse."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Rest:
    """What a server keeps: runs by id, each with its tags, parameters, points and statuses; ``calls`` counts requests by name."""

    def __init__(self):
        self.runs, self.calls, self.experiment = {}, [], False
        self.seconds, self.status, self.refuse = 0.0, 200, ""

    def answer(self, method, name, body):
        if self.status != 200:
            return self.status, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "busy"}
        if self.refuse and self.refuse in json.dumps(body):
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": f"no {self.refuse}"}
        return getattr(self, re.sub(r"\W", "_", name))(body)

    def experiments_get_by_name(self, body):
        if not self.experiment:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
        return 200, {"experiment": {"experiment_id": "1", "name": "csm", "lifecycle_stage": "active"}}

    def experiments_create(self, body):
        self.experiment = True
        return 200, {"experiment_id": "1"}

    def runs_create(self, body):
        run = f"{len(self.runs):032x}"
        tags = {tag["key"]: tag["value"] for tag in body["tags"]}
        self.runs[run] = {"name": body["run_name"], "tags": tags, "points": {}, "status": ["RUNNING"], "params": {}}
        return 200, {"run": self.run(run)}

    def runs_search(self, body):
        wanted = dict(re.findall(r"tags\.`(\S+)` = '([^']*)'", body["filter"]))
        found = [run for run, kept in self.runs.items() if wanted.items() <= kept["tags"].items()]
        return 200, {"runs": [self.run(run) for run in found]}

    def runs_get(self, body):
        return 200, {"run": self.run(body["run_id"])}

    def runs_update(self, body):
        self.runs[body["run_id"]]["status"].append(body["status"])
        return 200, {"run_info": self.run(body["run_id"])["info"]}

    def runs_log_batch(self, body):
        run = self.runs[body["run_id"]]
        run["params"] |= {param["key"]: param["value"] for param in body.get("params", [])}
        run["tags"] |= {tag["key"]: tag["value"] for tag in body.get("tags", [])}
        for point in body.get("metrics", []):
            run["points"][point["key"], point["timestamp"], point.get("step", 0)] = point["value"]  # MLflow's primary key
        return 200, {}

    def run(self, run):
        info = {"run_id": run, "experiment_id": "1", "status": self.runs[run]["status"][-1], "lifecycle_stage": "active"}
        return {"info": {**info, "run_name": self.runs[run]["name"]}, "data": {}}

    def named(self, name):
        (run,) = [run for run in self.runs.values() if run["name"] == name]
        return run


@contextmanager
def serving(rest, bound=None):
    """The address at which ``rest`` is served: that of the socket ``bound``, or one of its own."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self):
            time.sleep(rest.seconds)
            parts = urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else {key: values[0] for key, values in parse_qs(parts.query).items()}
            name = parts.path.partition("/mlflow/")[2].replace("/", "_").replace("-", "_")
            rest.calls.append(name)
            status, answer = rest.answer(self.command, name, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = handle_one  # noqa: N815

        def log_message(self, *arguments):
            """Quiet."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, address):
            """A client that was killed."""

    server = Quiet(("127.0.0.1", 0), Handler, bind_and_activate=False)
    if bound is None:
        server.server_bind()
    else:
        server.socket.close()
        server.socket = bound
    server.server_activate()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
