import os
import subprocess
import sys

import pytest

from csm.errors import InputError
from flows import cli
from flows.masking import masked
from flows.tracking_address import OWN, Address
from flows.tracking_inputs import origin_tags


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("foo://x", "foo://x: no known kind of tracking store; one of http://, https://, postgresql://"),
        ("databricks", "not in a folder; for example sqlite:///mlflow.db"),
        ("./mlruns", "not in a folder"),
        ("mlflow.db", "not in a folder"),
        ("file:///tmp/mlruns", "not in a folder"),
        ("http://", "not in a folder"),
        ("http://:5000", "needs a host, as in http://HOST:PORT"),
        ("http://host:port", "not an address"),
        ("http://host:0", "needs a host"),
        ("http://[::1", "not an address"),
        ("mysql+nope://host/mlflow", "not an address of a database"),
        ("mssql+pymssql://host/mlflow", "needs the Python package pymssql; install it"),
        ("sqlite://", "not in a folder"),
        ("sqlite:///", "needs a file"),
        ("sqlite://relative.db", "needs a file"),
        ("sqlite:///folder/", "needs a file"),
    ],
)
def test_an_address_that_mlflow_cannot_use_is_one_line(uri, words):
    with pytest.raises(InputError, match="--tracking-uri") as caught:
        Address(uri)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "is_local", "is_server"),
    [
        ("", True, False),
        ("http://127.0.0.1:5000", False, True),
        ("https://host/prefix", False, True),
        ("postgresql+psycopg2://user:word@host:5432/mlflow", False, False),
        ("sqlite:///mlflow.db", True, False),
        ("sqlite:////folder/mlflow.db", True, False),
    ],
)
def test_kinds_of_address(uri, is_local, is_server):
    address = Address(uri)
    assert (address.is_local, address.is_server) == (is_local, is_server)


def test_an_experiment_needs_a_name():
    with pytest.raises(InputError, match="--experiment"):
        Address(experiment=" ")


def test_each_address_and_experiment_has_files_of_its_own_and_a_new_password_the_same():
    names = [Address(uri, experiment).name for uri in ("", "http://a", "http://b") for experiment in ("csm", "other")]
    assert names[0] == OWN.name == "tracking"
    assert len(set(names)) == 6
    assert Address("http://u:old@a").name == Address("http://u:new@a").name != Address("http://a").name


SECRET = "hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{SECRET}@host:5000/",
        f"postgresql://user:{SECRET}@host/db?sslmode=require",
        f"postgresql://user:a@b{SECRET}@host/db",
        f"postgresql://host/db?user=me&password={SECRET}&sslmode=require",
        f"csm run --tracking-uri http://user:{SECRET}@host --set x.token={SECRET} --json",
        f"API request to http://user:{SECRET}@host/api failed with (host='host')",
        f"https://{SECRET}@host",
    ],
)
def test_no_secret_is_shown(text):
    shown = masked(text)
    assert SECRET not in shown
    assert "***" in shown
    assert "host" in shown


def test_an_error_of_an_address_shows_no_secret():
    with pytest.raises(InputError) as caught:
        Address(f"foo://user:{SECRET}@host")
    assert SECRET not in str(caught.value)
    assert SECRET not in str(Address(f"http://user:{SECRET}@host"))


def test_text_without_secrets_stays():
    text = "csm run --config demo --set train.seeds=5 --tracking-uri http://host:5000"
    assert masked(text) == text


def test_origin_is_the_commit_of_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "mlflow.source.git.commit" not in origin_tags("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert "mlflow.source.git.commit" not in origin_tags("")  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    tags = origin_tags(f"csm run --tracking-uri http://u:{SECRET}@h")
    assert tags["mlflow.source.git.commit"] == head
    assert tags["mlflow.source.name"] == "csm run --tracking-uri http://***@h"
    monkeypatch.setenv("PATH", "")
    assert "mlflow.source.git.commit" not in origin_tags("")


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """The one line of a command that is refused, and that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
        assert not any(tmp_path.iterdir())
        return err

    return run


@pytest.mark.parametrize("verb", ["prepare", "run"])
def test_a_command_refuses_a_wrong_address_before_it_does_anything(refused, verb):
    line = refused(verb, "--tracking-uri", f"foo://user:{SECRET}@x")
    assert line.startswith("csm: --tracking-uri foo://***@x: no known kind of tracking store; one of http://")


def test_the_address_of_the_environment_is_used_and_an_empty_one_is_none(refused, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///runs")
    assert "--tracking-uri file:///runs: runs are kept on a server or in a database" in refused("run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert refused("run", "--config", "nope").startswith("csm: --config nope")


@pytest.mark.parametrize("bench", ["truth", "calibration"])
def test_benchmarks_track_there_too(refused, bench):
    assert "no known kind of tracking store" in refused("bench", bench, "--tracking-uri", "foo://x")


def test_mlflow_tells_nobody_of_its_use():
    code = (
        "import os, flows.tracking; from mlflow.telemetry.client import get_telemetry_client as c; print(c(), sorted(os.environ))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("None ")
    assert "_MLFLOW_TELEMETRY_SESSION_ID" not in done.stdout
