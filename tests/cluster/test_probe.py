"""What is asked of every node, on two nodes of this machine and on one that stores nothing where the others do."""

import http.server
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster import probe
from cluster.probe import Node, answers, clean, code, installed, look, missing, nodes, share, write
from csm.errors import InputError

pytestmark = pytest.mark.ray


@pytest.fixture
def server():
    """Address of an HTTP server; ``server.status`` is what it says to GET /health."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(self.server.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.status = 200
    listening.url = f"http://127.0.0.1:{listening.server_address[1]}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def test_every_node_says_what_it_is_and_shares_a_folder(ray_session, tmp_path, server):
    found = nodes()
    assert len(found) == 1
    assert found[0].cpus == 2
    look(found, ["torch", "no-such-package"], server.url)
    share(found, tmp_path / "trial")
    (node,) = found
    assert (node.error, node.storage, node.tracking, node.cuda) == ("", "", "", "")
    assert node.versions == {
        "python": node.versions["python"],
        "torch": version("torch").split("+")[0],
        "no-such-package": None,
        "code": code(),
    }
    assert 0 < node.seconds < probe.ANSWER_SECONDS
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_is_not_there_does_not_hold_the_others(ray_session, tmp_path):
    (there,) = nodes()
    gone = Node("e" * len(there.id), "gone", "192.0.2.9", 1, 0)
    look([there, gone], [])
    share([there, gone], tmp_path / "trial")
    assert (there.error, there.storage) == ("", "")
    assert gone.error
    assert gone.versions == {}


def test_a_folder_that_cannot_be_written(ray_session, tmp_path):
    found = nodes()
    with pytest.raises(OSError, match="No such file"):
        share(found, tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []


def test_who_does_not_see_what_the_others_wrote(monkeypatch, tmp_path):
    """Three nodes, of which the last has another disk at the same path."""
    own = tmp_path / "own"
    own.mkdir()

    def place(node, path):
        return str(own / Path(path).name) if node.id == "c" else path

    def everywhere(found, call):
        results = []
        for node in found:
            function, (path, *more) = call(node)
            results.append((function(place(node, path), *more), "", 0.0))
        return results

    monkeypatch.setattr(probe, "_everywhere", everywhere)
    monkeypatch.setattr(probe, "SEEN_SECONDS", 0.3)
    found = [Node(name, f"h-{name}", f"10.0.0.{number}", 1, 0) for number, name in enumerate("abc")]
    share(found, tmp_path / "trial")
    others = "does not see what h-c (10.0.0.2) wrote, and h-c (10.0.0.2) does not see what it wrote"
    assert [node.storage for node in found[:2]] == [others] * 2
    assert found[2].storage == (
        "does not see what this machine, h-a (10.0.0.0), h-b (10.0.0.1) wrote, and this machine, h-a (10.0.0.0), h-b (10.0.0.1) does "
        "not see what it wrote"
    )
    assert list(own.iterdir()) == []
    assert list(tmp_path.iterdir()) == [own]


def test_files_on_a_store(bucket):
    place = str(bucket / "trial")
    write(place, "a")
    assert missing(place, ["a"]) == []
    clean(place)
    assert not bucket.exists()


def test_a_store_that_is_not_there(s3_server):
    with pytest.raises(InputError, match=r"s3://no-such-bucket/w: cannot be written and read"):
        write("s3://no-such-bucket/w", "a")


def test_a_file_of_other_content_is_not_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "SEEN_SECONDS", 0.1)
    (tmp_path / "a").write_text("b")
    assert missing(str(tmp_path), ["a", "c"]) == ["a", "c"]


@pytest.mark.parametrize(("status", "said"), [(200, ""), (401, ""), (403, ""), (503, "answers 503 Service Unavailable")])
def test_a_tracking_server(server, status, said):
    server.status = status
    assert answers(server.url) == said


def test_a_tracking_server_that_is_down(server):
    server.shutdown()
    server.server_close()
    assert "refused" in answers(server.url)
    assert "refused" in answers(server.url.replace("http", "postgresql+psycopg2"))


def test_a_database_that_listens(server):
    assert answers(server.url.replace("http", "postgresql+psycopg2")) == ""


def test_versions_without_the_suffix_of_a_build():
    assert "+" not in installed("torch")
    assert installed("no-such-package") is None
