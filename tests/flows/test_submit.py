"""`--submit` against a Ray with dashboard and token on this machine, and every verb's file as a script."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flows
from csm.errors import InputError
from flows.cli import cli
from flows.jobs import Jobs, _Log
from flows.submit import collect, run_job, words

SOURCES = Path(flows.__file__).parent
PYTHON = Path(sys.executable)
SCRIPTS = (
    "prepare",
    "shift",
    "fit_generator",
    "import_generator",
    "plan",
    "mix",
    "annotate",
    "train",
    "evaluate",
    "report",
    "run",
)
SCRIPTS = (*SCRIPTS, "tune", "export", "predict", "check", "calibrate", "serve", "compare", "ui", "doctor")


def parsed(*arguments):
    """Context and options of a command line, as a verb gets them."""
    name, *rest = arguments
    with cli.make_context("csm", [name, *rest], resilient_parsing=False) as group:
        context = cli.commands[name].make_context(name, list(rest), parent=group)
    options = dict(context.params)
    options.pop("submit"), options.pop("priority")
    return context, options


def test_the_command_line_of_the_job(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    context, options = parsed(
        "mix", "--config", "mine/tiny.yaml", "--set", "a.b=[1, 2]", "--set", "c=x y", "--workspace", "/shared/w", "--json",
        "--submit", "http://h:8265",
    )  # fmt: skip
    assert words(context, options) == [
        "mix", "--config=config/tiny.yaml", "--set=a.b=[1, 2]", "--set=c=x y", "--workspace=/shared/w", "--address=auto",
        "--experiment=csm", "--json",
    ]  # fmt: skip


def test_an_argument_and_an_address_of_the_users_own(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    context, options = parsed("import-generator", "/shared/edm.pkl", "--address", "10.0.0.1:6379", "--workspace", "s3://b/w")
    command = words(context, options)
    assert command[-2:] == ["--", "/shared/edm.pkl"]
    assert {"--address=10.0.0.1:6379", "--workspace=s3://b/w", "--tracking-uri=http://tracking:5000"} < set(command)


def test_only_sources_and_the_configuration_are_sent(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {source: digits}\n")
    collect(tmp_path / "job", str(mine))
    sent = tmp_path / "job"
    assert {path.name for path in sent.iterdir()} == {"csm", "cluster", "flows", "config"}
    assert (sent / "config" / "mine.yaml").read_text() == mine.read_text()
    assert (sent / "flows" / "configs" / "demo.yaml").is_file()
    assert not list(sent.rglob("__pycache__"))
    assert sum(path.stat().st_size for path in sent.rglob("*")) < 5e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            r"--workspace workspace: the job runs on the cluster: give the whole path of a folder that every node sees, or s3://",
        ),
        (
            ("--workspace", "/w", "--tracking-uri", "sqlite:///mlflow.db"),
            r"--tracking-uri sqlite:///mlflow.db: .* sqlite:////shared",
        ),
        (("--workspace", "/w", "--tracking-uri", "http://me:pass@h:5000"), r"http://\*\*\*@h:5000.*MLFLOW_TRACKING_PASSWORD"),
        (("--workspace", "/w", "--set", "generator.path=photos"), r"generator.path: photos lies on this machine"),
        (("--workspace", "/w", "--set", "train.seeds=0"), r"train.seeds: expected a number greater"),
        (("--workspace", "/w"), r"--submit http://127.0.0.1:1: no Ray dashboard answers there \(.*refused\)"),
    ],
)
def test_what_cannot_work_there_is_refused_here(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=message) as refused:
        run_job("http://127.0.0.1:1", *parsed("run", *arguments))
    assert "pass@" not in str(refused.value)


@pytest.mark.parametrize("url", ["h:8265", "ray://h:10001", "http://", "http://h:port", "http://me:secret@h:8265"])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError, match="--submit: expected http://HEAD:8265") as refused:
        Jobs(url)
    assert "secret" not in str(refused.value)


def test_ctrl_c_before_the_job_is_there_says_so(monkeypatch, capsys):
    class Interrupted:
        def __init__(self, url):
            pass

        def start(self, *job):
            raise KeyboardInterrupt

    monkeypatch.setattr("flows.submit.Jobs", Interrupted)
    assert run_job("http://h:8265", *parsed("run", "--workspace", "/w")) == 130
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("http://h:8265 answers: asking it for job csm-run-")
    assert last.startswith("interrupted before http://h:8265 said that it has job csm-run-")


def test_priority_is_a_setting(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("flows.submit.run_job", lambda url, context, options: seen.update(options, url=url) or 7)
    with pytest.raises(SystemExit) as ended:
        cli.main(["mix", "--submit", "http://h:8265", "--set", "a=1", "--priority", "-2"], prog_name="csm")
    assert ended.value.code == 7
    assert (seen["url"], seen["overrides"]) == ("http://h:8265", ("a=1", "resources.priority=-2"))


def test_a_log_told_again_is_printed_once(capsys):
    log = _Log(as_json=True)
    log.again()
    log.add("one\ntw")
    log.again()  # the connection was lost
    log.add("on")
    log.add("e\ntwo\n{}\n")
    log.close(done=True)
    assert capsys.readouterr() == ("{}\n", "one\ntwo\n")


def test_a_log_without_result(capsys):
    log = _Log(as_json=False)
    log.again()
    log.add("half")
    log.add(" line\n")
    assert capsys.readouterr().err == "half line\n"
    log.close(done=True)
    log = _Log(as_json=True)
    log.again()
    log.add("csm: no\n")
    log.close(done=False)
    assert capsys.readouterr() == ("", "csm: no\n")


@pytest.mark.parametrize("verb", SCRIPTS)
def test_every_verbs_file_ends_as_a_script(verb):
    text = (SOURCES / f"{verb}.py").read_text()
    assert text.endswith('\n\nif __name__ == "__main__":\n    from flows.cli import script\n\n    script(__file__)\n')
    assert verb.replace("_", "-") in cli.commands


def test_no_module_hides_one_of_pythons():
    """`python flows/VERB.py` has flows/ first on its path."""
    assert not {path.stem for path in SOURCES.glob("*.py")} & sys.stdlib_module_names


def test_a_script_alone_in_another_folder(tmp_path):
    """As `ray submit` copies and starts it."""
    shutil.copy(SOURCES / "fit_generator.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(SOURCES.parent)}
    command = [PYTHON, "fit_generator.py", "--config", "nope"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("csm: --config nope: unknown configuration")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Environment for clients of a Ray with dashboard and token; ``URL`` is its address."""
    folder = Path("/tmp") / f"csm-{os.getpid()}"  # sockets below it must have short names
    ports = 20000 + 12 * (os.getpid() % 900)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(SOURCES.parent),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    start = (
        f"{PYTHON.parent}/ray start --head --block --num-cpus=2 --object-store-memory=100000000 --disable-usage-stats --temp-dir={folder} "
        f"--dashboard-host=127.0.0.1 --port={ports} --dashboard-port={ports + 1} --ray-client-server-port={ports + 2} "
        # Another Ray on this machine has the usual one, and without it the agent takes no jobs.
        f"--dashboard-agent-listen-port={ports + 3}"
    )
    ray = subprocess.Popen(start.split(), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    environment["URL"] = f"http://127.0.0.1:{ports + 1}"
    end = time.monotonic() + 120
    while subprocess.run(
        ["ray", "job", "list", "--address", environment["URL"]], env=environment, capture_output=True, check=False
    ).returncode:
        assert ray.poll() is None, ray.stderr.read()
        assert time.monotonic() < end
        time.sleep(1)
    yield environment
    ray.send_signal(signal.SIGTERM)
    ray.wait(120)
    shutil.rmtree(folder, ignore_errors=True)


def begin(head, *arguments):
    command = [PYTHON, "-m", "flows.cli", *map(str, arguments), "--submit", head["URL"]]
    return subprocess.Popen(command, cwd="/", env=head, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process, text):
    said = ""
    while text not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_from_its_start_to_its_exit_code(head, tmp_path, tiny):
    work = tmp_path / "w"
    done = begin(head, "prepare", "--config", tiny, "--workspace", work, "--json")
    out, err = done.communicate(timeout=200)
    assert done.returncode == 0, err
    assert json.loads(out)["stages"]["prepare"]["rows"] == 1797
    assert out.count("\n") == 1
    assert re.search(r"job csm-prepare-[0-9a-f]{16}: submitted to ", err)
    assert (work / "dataset.json").is_file()
    failed = begin(head, "report", "--config", tiny, "--workspace", work)
    out, err = failed.communicate(timeout=200)
    assert (failed.returncode, out) == (2, "")
    assert err.splitlines()[-1].startswith("csm: ")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_it_the_same_command_joins_it_and_it_can_be_stopped(head, tmp_path, write_config):
    endless = write_config(generator={"steps": 10**6})
    command = ("fit-generator", "--config", endless, "--workspace", tmp_path / "w")
    prepared = begin(head, "prepare", *command[1:])
    prepared.communicate(timeout=200)
    assert prepared.returncode == 0
    first = begin(head, *command)
    job = re.search(r"job (\S+): submitted", read_until(first, "generator: started"))[1]
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert f"`ray job stop --address {head['URL']} {job}` stops it" in err
    assert "Traceback" not in err
    second = begin(head, *command)
    assert f"job {job}: is there already" in read_until(second, "generator: started")
    subprocess.run(["ray", "job", "stop", "--address", head["URL"], job], env=head, capture_output=True, check=True, timeout=60)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 130
    assert f"job {job}: stopped; the same command goes on" in err
    third = begin(head, *command)  # ended before: it starts anew, under another name
    assert f"job {job}-2: submitted" in read_until(third, "submitted")
    third.send_signal(signal.SIGINT)
    third.communicate(timeout=60)
    subprocess.run(
        ["ray", "job", "stop", "--address", head["URL"], f"{job}-2"], env=head, capture_output=True, check=True, timeout=60
    )


@pytest.mark.slow
@pytest.mark.ray
def test_without_the_token_nothing_is_submitted(head, tmp_path):
    stranger = {**{name: value for name, value in head.items() if not name.startswith("RAY_AUTH")}, "HOME": str(tmp_path)}
    refused = begin(stranger, "plan", "--workspace", tmp_path / "w")
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 2
    assert "the cluster asks for its token: export RAY_AUTH_MODE=token" in err
    assert err.count("\n") == 1
    wrong = {**head, "RAY_AUTH_TOKEN": "0" * 64}
    refused = begin(wrong, "plan", "--workspace", tmp_path / "w")
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 2
    assert "asks for its token" in err


@pytest.mark.slow
@pytest.mark.ray
def test_no_secret_of_the_environment_is_in_the_jobs_description(head, tmp_path):
    secret = {**head, "AWS_SECRET_ACCESS_KEY": "a-secret-of-mine", "MLFLOW_TRACKING_PASSWORD": "another-secret"}
    done = begin(secret, "plan", "--workspace", tmp_path / "w")
    _, err = done.communicate(timeout=200)
    assert "not sent along: " in err
    assert "AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD" in err
    listed = subprocess.run(
        ["ray", "job", "list", "--address", head["URL"]], env=head, capture_output=True, text=True, check=True
    )
    assert "csm-plan-" in listed.stdout
    assert not any(word in listed.stdout + err for word in ("a-secret-of-mine", "another-secret", head["RAY_AUTH_TOKEN"]))
