"""What a user sees of the command line itself: help, exit codes, verbs, and failures that are nobody's input."""

import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.config import load_config
from flows.run import STAGES, VERBS, verb_stages
from tests.flows.cli.conftest import RUN_VERBS

ALL_VERBS = (*RUN_VERBS, "tune", "export", "predict", "check", "calibrate", "serve", "compare", "ui", "doctor")


# The installed console script, as a user starts it.


def test_help_is_fast_and_names_every_verb(csm, call):
    done = csm("--help", timeout=20)  # in 0.2 s when nothing else runs: neither torch nor ray is imported
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in ALL_VERBS)
    assert done.stderr == ""


def test_help_imports_nothing_heavy(processes):
    code = "import sys, flows.cli; assert not {'torch', 'ray', 'mlflow', 'polars'} & set(sys.modules), sorted(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--config", "nope"), "csm: --config nope: unknown configuration; give a .yaml file or one of "),
        (
            ("mix", "--set", "plan.nope=1"),
            "csm: plan.nope: no such setting; allowed: pairs, pairs_per_class, ratios, grid, alpha, sets_per_pair, noise, shard_rows, seed",
        ),
    ],
)
def test_the_script_refuses_in_one_line(csm, tmp_path, arguments, message):
    done = csm(*arguments, "--workspace", tmp_path / "w", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


# The same command line in this process, which has paid for the imports already.


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_every_verb_explains_itself(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: csm {verb} [OPTIONS]")


def test_version(call):
    assert call("--version")[:2] == (0, "csm, version 0.1.0\n")


@pytest.mark.parametrize("arguments", [("nope",), ("run", "--nope"), ("run", "--set"), ("ui", "--port", "0")])
def test_wrong_usage_is_exit_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


# Failures that are nobody's input.


def test_a_failure_is_exit_1_in_one_line_and_debug_shows_where(call, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("flows.run.run_verb", broken)
    code, out, err = call("plan")
    assert (code, out) == (1, "")
    assert err == "csm: failed: RuntimeError: first line second line (--debug shows where; the same command goes on)\n"
    code, _, err = call("plan", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in broken" in err


def test_an_interrupt_is_exit_130_in_one_line(call, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.run.run_verb", interrupted)
    assert call("plan") == (130, "", "csm: interrupted; run the same command again to go on\n")
    forced = call("run", "--force", "mix")  # what it made would be thrown away once more
    assert forced == (130, "", "csm: interrupted; run the same command again, without --force, to go on\n")


def test_a_full_disk_says_so(call, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device", "/w/mixed/part")

    monkeypatch.setattr("flows.run.run_verb", full)
    code, _, err = call("mix")
    assert code == 2
    assert err.startswith("csm: /w/mixed/part: No space left on device; free space")


def test_verbs_cover_every_stage():
    assert set(VERBS) == {*RUN_VERBS, "import-generator"}
    shifted = load_config("demo", ["evaluate.shifts.photographs.kind=photographs"])
    assert verb_stages("run", shifted) == tuple(STAGES)
    assert {stage for verb in set(RUN_VERBS) - {"run"} for stage in verb_stages(verb, shifted)} == set(STAGES)


def test_the_module_is_a_script_too():
    assert Path(cli.__file__).read_text().endswith('if __name__ == "__main__":\n    main()\n')
