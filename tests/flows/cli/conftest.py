"""The command line in this process, which has paid for the imports already."""

import sys

import pytest

from flows import cli

RUN_VERBS = ("prepare", "shift", "fit-generator", "plan", "mix", "annotate", "train", "evaluate", "report", "run")


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``call(*arguments)`` runs the command line in this process; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, **named):
        monkeypatch.setattr(sys, "argv", ["csm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def refused(call):
    """``refused(*arguments)`` runs a command that must be refused and gives its one line, without ``csm: ``."""

    def run(*arguments, **named):
        code, out, err = call(*arguments)
        assert code == 2, err
        assert out == ""
        said = [line for line in err.splitlines() if not line.endswith(": reused") and ": reused (" not in line]
        assert len(said) == 1, err
        assert said[0].startswith("csm: ")
        return said[0].removeprefix("csm: ")

    return run
