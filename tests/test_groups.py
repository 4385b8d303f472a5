"""Sharing tests out to processes, of which some end before their time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a pytest of two processes each

CONFTEST = """
import os, pytest
from tests.groups import Groups

def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log)

@pytest.fixture(scope="session")
def finished():
    pass
"""
ENDS = """
import os, pytest

@pytest.mark.parametrize("number", range(6))
def test_ends(number):
    if number in (3, 5):
        os._exit(1)
"""
PASSES = """
import os, time, pytest

@pytest.mark.parametrize("number", range(3))
def test_passes({fixture}number):
    time.sleep(0.2)
    print(f"in <{{__name__}} {{os.getpid()}}>")
"""


def run(folder: Path, **files: str) -> str:
    """What pytest, with two processes, says of ``files``; it has to come to its end."""
    for name, text in {"conftest": CONFTEST, **files}.items():
        (folder / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-n", "2", "-rA", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout


def test_a_test_that_ends_its_process_fails_once_and_all_others_run(tmp_path):
    said = run(tmp_path, test_ends=ENDS, test_more=PASSES.format(fixture=""), test_other=PASSES.format(fixture=""))
    assert "2 failed, 10 passed" in said
    assert set(re.findall(r"FAILED (\S+)", said)) == {"test_ends.py::test_ends[3]", "test_ends.py::test_ends[5]"}


def test_a_process_that_ends_when_the_other_is_done_leaves_nothing_undone(tmp_path):
    last = ENDS.replace("range(6)", "range(4)").replace(
        "if number in (3, 5):\n", "if number == 2:\n        import time; time.sleep(2)\n"
    )
    said = run(tmp_path, test_ends=last, test_more=PASSES.format(fixture=""), test_other=PASSES.format(fixture=""))
    assert "1 failed, 9 passed" in said


def test_a_process_that_ends_while_the_replacement_of_another_collects_its_tests(tmp_path):
    first = ENDS.replace("in (3, 5)", "== 1")
    second = first.replace("if number", "import time; time.sleep(1.5)\n    if number")
    slow = f"import time\ntime.sleep(4)\n{PASSES.format(fixture='')}"  # to collect
    said = run(tmp_path, test_first=first, test_second=second, test_slow=slow)
    assert "2 failed, 13 passed" in said


def test_files_that_read_the_finished_workspace_go_to_one_process(tmp_path):
    said = run(
        tmp_path, **dict.fromkeys(("test_a", "test_b"), PASSES.format(fixture="finished, ")), test_c=PASSES.format(fixture="")
    )
    assert "9 passed" in said
    processes = dict(re.findall(r"in <(\w+) (\d+)>", said))
    assert processes["test_a"] == processes["test_b"] != processes["test_c"]
