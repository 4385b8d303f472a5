"""The figures of `csm bench scale`; the limit is that of the product."""

import json

import pytest
from click.testing import CliRunner

from flows.bench import actors
from flows.bench.scale import plan_costs, plans_table
from flows.cli import cli

STEPS = ["plan", "plan_shards", "read", "first", "listing", "receipts", "finished", "resume", "stale"]


def test_numbers_that_are_none_are_refused() -> None:
    for text in ("1e6,many", "0", "1.5", "-1e6"):
        said = CliRunner().invoke(cli, ["bench", "scale", "--rows", text])
        assert said.exit_code == 2
        assert "expected whole numbers" in said.output


def test_with_nothing_to_measure_it_says_nothing() -> None:
    said = CliRunner().invoke(cli, ["bench", "scale", "--rows", "", "--actors", "", "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["actors"] == json.loads(said.stdout)["plans"] == []


def test_a_step_that_a_plan_lacks_is_an_empty_cell() -> None:
    cost = {"seconds": 1.5, "mib": 2000}
    small, large = ({"rows": 1000 * n, "shards": n, "parts": 3 * n, "imports_mib": 280, "plan": cost} for n in (20, 4000))
    table = plans_table([{**small, "footers": cost}, large])
    assert [column.header for column in table.columns] == ["step", "20 shards", "4,000 shards"]
    assert [list(column.cells) for column in table.columns] == [
        ["plan", "footers"],
        ["1.50 s 2,000 MiB"] * 2,
        ["1.50 s 2,000 MiB", ""],
    ]


def test_actors_that_share_a_core_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 100.0, 2: 180.0, 4: 190.0}
    monkeypatch.setattr(actors.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(
        actors,
        "in_a_process",
        lambda function, case, *sizes: {"actors": sizes[0], "images_per_s": rates[sizes[0]]} if sizes else 1.0,
    )
    assert [row["efficiency"] for row in actors.actor_speed("unet", (1, 2, 4))] == [1.0, 0.9, 0.95]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_says_what_actors_and_plans_cost(csm) -> None:
    done = csm("bench", "scale", "--rows", "2e4", "--actors", "1,2", "--seconds", "0.5", "--json", timeout=580)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [(row["case"], row["actors"]) for row in result["actors"]] == [(case, n) for case in actors.CASES for n in (1, 2)]
    for row in result["actors"]:
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"], rel=0.05)
        assert 0 < row["driver_share"] < 1
    (plan,) = result["plans"]
    assert plan["shards"] == 21  # 56 sets of 45 pairs x 8 ratios, 1,000 to a shard
    assert plan["rows"] == 20_160
    assert plan["parts"] == 3 * (21 - 4)
    for step in (*STEPS, "footers"):
        assert 0 <= plan[step]["seconds"] < 60
        assert plan[step]["mib"] > 50


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_100_000_finished_shards_are_gone_on_with_within_a_minute() -> None:
    plan = plan_costs(100_000_000)
    assert plan["shards"] == 100_001
    assert plan["resume"]["seconds"] < 60
    assert max(plan[step]["mib"] for step in STEPS) < 4096
