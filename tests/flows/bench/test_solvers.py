import json
import sys

import numpy as np
import pytest
import torch

from csm.generators.gaussians import GaussianGenerator, GaussiansSpec
from csm.sampling import SOLVERS, SamplerConfig
from flows import cli
from flows.bench import solvers as bench


@pytest.fixture
def workspace(tmp_path):
    """A workspace that holds a generator of 2 classes and nothing else."""
    draw = np.random.default_rng(0)
    covariances = np.stack([np.diag(draw.uniform(0.01, 0.3, 4)) for _ in range(2)])
    values = (draw.uniform(-0.5, 0.5, (2, 4)), covariances, np.full(2, 0.5))
    GaussianGenerator(GaussiansSpec((2, 2, 1), 2), *(torch.from_numpy(value) for value in values)).save(tmp_path / "generator")
    return tmp_path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["csm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def test_every_solver_and_spacing_is_compared(workspace, monkeypatch, capsys):
    monkeypatch.setattr(bench, "COUNTS", (5, 39))
    monkeypatch.setattr(bench, "SPACINGS", ({"spacing": "karras", "rho": 5.0}, {"spacing": "exponential", "sigma_min": 0.02}))
    assert call(monkeypatch, "bench", "solvers", "--workspace", workspace, "--rows", 6, "--json") in (0, None)
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert list(result) == ["rows", "reference", "target", "measured", "fewest", "winner"]
    seen = {(line["generator"], line["sampler"]["solver"], line["sampler"]["spacing"]) for line in result["measured"]}
    assert seen == {
        (name, solver, spacing)
        for name in ("trained", "gaussians")
        for solver in SOLVERS
        for spacing in ("karras", "exponential")
    }
    assert all(line["sampler"]["steps"] in (3, 5, 20, 39) for line in result["measured"])
    assert result["fewest"]["trained"]["heun"]["evaluations"] <= 39
    winner = SamplerConfig(**result["winner"])
    text = "\n".join(out[:-1])
    assert f"fewest on all: {winner.solver}, {winner.spacing}" in text
    lines = [line.split() for line in text.splitlines()]
    row = next(line for line in lines if line[:2] == ["euler", "karras,"] and "gaussians" in line)
    found = [line for line in result["measured"] if (line["generator"], line["sampler"]["solver"]) == ("gaussians", "euler")]
    at_39 = next(line for line in found if line["sampler"]["rho"] == 5 and line["evaluations"] == 39)
    assert row[:7] == ["euler", "karras,", "rho", "5,", "80", "to", "0.002"]
    assert row[-1].rstrip("*") == f"{at_39['rms']:.2f}"


def test_a_workspace_without_a_generator_is_named(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "bench", "solvers", "--workspace", tmp_path) == 2
    assert "generator.json does not exist" in capsys.readouterr().err


def test_the_plan_has_as_many_rows_as_asked_for_of_many_kinds(workspace):
    generator = bench._gaussians()
    plan = bench._plan(generator, 500)
    assert len(plan) == 500
    assert plan["lam"].n_unique() == 8
    assert len(plan.select("class_a", "class_b").unique()) == 45
    assert len(bench._plan(generator, 3)) == 3
