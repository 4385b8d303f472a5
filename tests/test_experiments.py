"""The scripts of docs/experiments run on a finished workspace; what they find is in docs/research.md."""

import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "docs" / "experiments"
SCRIPTS = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem != "common")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_it_prints_a_row_for_each_case(finished, script):
    command = [sys.executable, str(EXPERIMENTS / f"{script}.py"), str(finished.root), "--seeds", "1", "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(head) >= 6
    assert len(rows) >= (2 if script == "annotator" else 5)
    assert all(len(row) == len(head) for row in rows)
    figures = [float(cell) for row in rows for cell in row[2:] if cell.strip()]  # TV is known of some data only
    assert min(figures) >= 0
    assert len(figures) >= 4 * len(rows)


def test_every_script_is_in_the_docs():
    text = (EXPERIMENTS.parent / "research.md").read_text()
    assert SCRIPTS
    assert [script for script in SCRIPTS if f"docs/experiments/{script}.py" not in text] == []
