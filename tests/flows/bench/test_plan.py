"""The figures of `csm bench plan`; the limits are those of the product."""

import json

import pytest
from click.testing import CliRunner

from flows.bench.plan import plan
from flows.cli import cli

KEYS = ["rows", "classes", "pairs", "sets", "shards", "seconds", "cpu_seconds", "rows_per_s", "file_mib"]
KEYS += ["shards_ms", "read_ms", "peak_mib"]


def test_a_small_plan_is_told_in_the_same_words() -> None:
    said = CliRunner().invoke(cli, ["bench", "plan", "--rows", "100000", "--json"])
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout.splitlines()[-1])
    assert list(result) == KEYS
    assert 100_000 <= result["rows"] == result["pairs"] * result["sets"] * 8 <= 110_000
    assert result["pairs"] == result["classes"] * (result["classes"] - 1) // 2
    assert all(result[key] > 0 for key in KEYS)


@pytest.mark.slow
def test_ten_million_rows_take_30_seconds_and_2_gib_of_one_core() -> None:
    result = plan(10_000_000)
    assert result["rows"] >= 10_000_000
    assert result["pairs"] == 499_500
    assert result["cpu_seconds"] < 30
    assert result["peak_mib"] < 2048
