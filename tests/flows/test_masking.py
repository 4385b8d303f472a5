"""No secret in what is shown, recorded or sent: of an address, of an option, of the environment."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from csm.errors import InputError
from csm.locations import location
from flows import run
from flows.cli import cli
from flows.config import load_config
from flows.masking import command_line, has_secret, masked
from flows.sweep_records import SweepFolder, TrialRecord
from flows.tracking import Tracker
from flows.tracking_address import Address

SECRET = "hunter2-and-more"
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)  # fmt: skip


def files_with(root: Path, text: str) -> list[str]:
    """Files below ``root`` that hold ``text``."""
    return [str(path) for path in root.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://me:{SECRET}@host/db",
        f"https://{SECRET}@host/api",
        f"s3://bucket/key?X-Amz-Signature={SECRET}&part=1",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"--set x.token={SECRET}",
    ],
)
def test_what_is_secret_is_seen_and_not_shown(text: str) -> None:
    assert has_secret(text)
    assert SECRET not in masked(text)


@pytest.mark.parametrize(
    "text",
    ["http://host:5000/x@y", "sftp://me@host/folder", "s3://bucket/a:b@c", "a photo of a {}", "train.seeds=5", "/data/a@b:c"],
)
def test_what_is_not_is_not(text: str) -> None:
    assert not has_secret(text)


def test_a_header_is_not_shown() -> None:
    assert masked(f"refused: Authorization: Bearer {SECRET}") == "refused: Authorization: Bearer ***"


@pytest.mark.parametrize("name", VARIABLES)
def test_secrets_of_the_environment_are_seen_wherever_they_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    assert has_secret(f"key {SECRET} refused")
    assert masked(f"key {SECRET} refused") == "key *** refused"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "something"),
        ("RAY_AUTH_TOKEN_PATH", "/root/token-file"),
        ("HF_TOKEN", "short"),
        ("HOME_KEY", SECRET),
    ],
)
def test_other_variables_are_not_secret(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert masked(f"a {value} b") == f"a {value} b"


def test_ray_would_show_the_command_line_so_it_may_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["csm", "run", "--tracking-uri", f"http://me:{SECRET}@host"])
    assert command_line("local") == "csm run --tracking-uri http://***@host"
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        command_line("auto")
    assert SECRET not in str(caught.value)
    result = CliRunner().invoke(cli, ["run", "--address", "auto", "--tracking-uri", f"http://me:{SECRET}@host"])
    assert result.exit_code == 2
    assert "a password or token stands on the command line" in result.output
    assert SECRET not in result.output


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors_and_tracebacks_show_none(debug: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"could not connect to postgresql://me:{SECRET}@host/db with {SECRET}")

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setattr(run, "run_verb", fail)
    monkeypatch.setattr(sys, "argv", ["csm", "run", *debug])
    result = CliRunner().invoke(cli, ["run", "--workspace", str(tmp_path / "w"), *debug])
    assert result.exit_code == 1
    assert "could not connect to postgresql://***@host/db with ***" in result.output
    assert ("Traceback" in result.output) == bool(debug)
    assert SECRET not in result.output


@pytest.mark.parametrize(
    "override",
    [
        f"data.path=ftp://me:{SECRET}@host/x",
        f"generator.path=https://{SECRET}@host",
        f"train.methods.csm.description=token={SECRET}",
    ],
)
def test_settings_which_are_kept_hold_none(override: str) -> None:
    with pytest.raises(InputError, match=rf"^{override.partition('=')[0]}: holds a password or token") as caught:
        load_config("image-folder", [override])
    assert SECRET not in str(caught.value)


def test_addresses_of_stores_which_are_kept_hold_none() -> None:
    with pytest.raises(InputError, match="AWS_SECRET_ACCESS_KEY") as caught:
        location(f"s3://key:{SECRET}@bucket/w")
    assert str(caught.value).startswith("s3://***@bucket/w: ")
    assert SECRET not in str(caught.value)
    assert str(location("memory://me@host/w")).endswith("me@host/w")


def test_neither_the_spool_nor_mlflow_gets_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    tracker = Tracker(tmp_path, Address(f"sqlite:///{tmp_path}/mlflow.db"), f"csm run --set a.password={SECRET}")
    tags = {"csm.kind": "pipeline", "note": f"http://me:{SECRET}@host"}
    tracker.open_run("key", "name", tags, {"path": f"http://{SECRET}@host", "list": [f"token {SECRET}"], "seeds": 3})
    assert files_with(tmp_path, "token ***"), "it was recorded"
    tracker.set_tags("key", {"more": SECRET})
    tracker.close_run("key")
    tracker.flush()
    tracker.close()
    assert files_with(tmp_path, "token ***")
    assert files_with(tmp_path, SECRET) == []


def test_the_error_of_a_trial_keeps_none(tmp_path: Path) -> None:
    SweepFolder(tmp_path).write_trial(TrialRecord(0, {}, error=f"no answer from http://me:{SECRET}@host"))
    assert files_with(tmp_path, "http://***@host")
    assert files_with(tmp_path, SECRET) == []


@pytest.mark.slow
@pytest.mark.ray
def test_commands_leave_none_behind_and_tell_ray_none(
    tiny: Path, csm: Callable[..., Any], ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every secret in the environment and a tracking server with a password that does not answer."""
    import ray
    from ray._private.worker import global_worker

    for number, name in enumerate(VARIABLES):
        monkeypatch.setenv(name, f"{SECRET}-{number}")
    monkeypatch.delenv("RAY_AUTH_TOKEN")  # the cluster of the tests has none
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:1")
    common = ["--config", tiny, "--workspace", tmp_path / "w", "--debug"]
    prepared = csm("prepare", *common)
    rates = [
        text for stage in ("generator", "fit-teacher", "fit-annotators", "annotate", "train") for text in ("--rate", f"{stage}=1")
    ]
    estimated = csm("plan", "--estimate", *rates, "--measure", "0.1", "--address", ray_address, *common)
    for done in (prepared, estimated):
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    assert files_with(tmp_path, "pipeline"), "what could not be sent waits there"
    assert files_with(tmp_path, SECRET) == []
    from cluster.session import session

    with session(ray_address):
        jobs = str(global_worker.gcs_client.get_all_job_info())
        assert "--estimate" in jobs, "Ray keeps command lines"
        assert SECRET not in jobs
        assert SECRET not in ray.get_runtime_context().get_runtime_env_string()


def test_no_source_sends_variables_of_the_environment_in_a_runtime_environment() -> None:
    """Ray keeps runtime environments in its list of jobs; whoever needs a secret has it where it runs."""
    root = Path(__file__).parents[2]
    sources = [path for folder in ("cluster", "csm", "flows") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 200
    assert [str(path) for path in sources if "env_vars" in path.read_text(encoding="utf-8")] == []
