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
    wrong = share(found, tmp_path / "not" / "there")
    assert wrong == f"cannot write: No such file or directory ({tmp_path}/not/there)"
    assert [node.storage for node in found] == [wrong]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_disks(monkeypatch):
    """``on_disks(driver, **disks)`` lets them share a folder, each on the disk of that name; the nodes, and what is wrong with the driver.

    On the disk "sealed" nothing can be written, and what lies on "private" only those with that disk can read, who can read "shared" too.
    """
    lie = {}

    def write_at(disk, name):
        if disk == "sealed":
            raise PermissionError(13, "Permission denied", "/w")
        lie[name] = disk

    def missing_at(disk, names):
        seen = {disk, "shared"} if disk == "private" else {disk}
        return [name for name in names if lie[name] not in seen]

    def run(driver, **disks):
        def everywhere(found, call):
            results = []
            for node in found:
                function, (_, *more) = call(node)
                try:
                    results.append((function(disks[node.id], *more), "", 0.0))
                except OSError as error:
                    results.append((None, probe._line(error), 0.0))
            return results

        for name, function in {
            "_everywhere": everywhere,
            "write": write_at,
            "missing": missing_at,
            "clean": lambda _: None,
        }.items():
            monkeypatch.setattr(probe, name, function)
        found = [Node(name, name, "ip", 1, 0) for name in disks]
        return {node.id: node for node in found}, share(found, Path(driver))

    return run


def test_one_node_with_another_disk_at_the_same_path(on_disks):
    found, wrong = on_disks("shared", a="shared", b="shared", c="own")
    assert [wrong, found["a"].storage, found["b"].storage] == ["", "", ""]
    assert found["c"].storage == (
        "does not see what this machine, a (ip), b (ip) wrote, and this machine, a (ip), b (ip) does not see what it wrote"
    )


def test_one_node_whose_files_the_others_cannot_read(on_disks):
    found, wrong = on_disks("shared", a="shared", b="private")
    assert [wrong, found["a"].storage] == ["", ""]
    assert found["b"].storage == "this machine, a (ip) does not see what it wrote"


def test_one_node_that_cannot_write(on_disks):
    found, wrong = on_disks("shared", a="shared", b="sealed")
    assert [wrong, found["a"].storage] == ["", ""]
    assert found["b"].storage == "cannot write: Permission denied (/w)"


def test_no_two_nodes_with_the_same_disk(on_disks):
    found, wrong = on_disks("own", a="a", b="b")
    assert wrong == ""  # nobody is in the majority: this machine is what they are held against
    assert [node.storage for node in found.values()] == [
        "does not see what this machine wrote, and this machine does not see what it wrote"
    ] * 2


def test_the_driver_is_the_odd_one(on_disks):
    found, wrong = on_disks("own", a="shared", b="shared")
    assert wrong == "does not see what a (ip), b (ip) wrote, and a (ip), b (ip) does not see what it wrote"
    assert [node.storage for node in found.values()] == ["", ""]


def test_a_driver_that_cannot_write_leaves_the_nodes_to_be_judged(on_disks):
    found, wrong = on_disks("sealed", a="shared", b="shared", c="own")
    assert wrong == "cannot write: Permission denied (/w)"
    assert [found["a"].storage, found["b"].storage] == ["", ""]
    assert found["c"].storage == "does not see what a (ip), b (ip) wrote, and a (ip), b (ip) does not see what it wrote"


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
