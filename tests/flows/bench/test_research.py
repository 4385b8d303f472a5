import json
from pathlib import Path

import pytest
import torch
import yaml

from csm import tables
from csm.errors import InputError
from csm.metrics import evaluate
from flows.bench.research import research
from flows.bench.research_views import markdown, verdict
from flows.bench.research_views import tables as shown
from flows.bench.studies import Study
from flows.options import print_table


def row(method, val, test, val_minus=None, test_minus=None, **more):
    """A row whose four figures are ``val`` and ``test``."""
    names = ("accuracy", "ece", "nll", "brier")
    values = {f"{split}_{name}": value for split, value in (("val", val), ("test", test)) for name in names}
    values |= {f"{split}_{name}_minus": value for split, value in (("val", val_minus), ("test", test_minus)) for name in names}
    fixed = {"study": "mine", "dataset": "digits-hard", "reference": "csm", "seeds": 3, "test_tv": None}
    return {**fixed, "method": method, **values, **more}


STUDY = Study("Is it?", "It is.", ("digits-hard",), {"a": {}, "b": {}})
ROWS = [
    row("csm", 0.6, 0.5),
    row("a", 0.5, 0.7, [-0.1, -0.15, -0.05], [0.2, 0.1, 0.3]),
    row("b", 0.7, 0.1, [0.1, 0.0, 0.2], [-0.4, -0.5, -0.3]),
]


def test_validation_decides_and_not_test():
    said = verdict(ROWS)
    assert said.startswith(
        "Least NLL on validation: `a`; x100, less the reference `csm`, val: -10.0 (-15.0 to -5.0); test: +20.0 ("
    )
    assert "its interval excludes 0" in said
    unsure = verdict([ROWS[0], row("a", 0.59, 0.7, [-0.01, -0.05, 0.02], [0.2, 0.1, 0.3])])
    assert "its interval holds 0: no difference is shown" in unsure
    assert verdict([ROWS[0], ROWS[2]]) == "On validation no method has a lower NLL than the reference, `csm`."


def test_both_splits_are_shown_and_marked(capsys):
    (table,) = shown("mine", STUDY, ROWS)
    print_table(table, 160)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine on digits-hard, 3 seeds: Is it?")
    body = [line for line in lines if line.strip().startswith(("validation", "test"))]
    assert [line.split()[0] for line in body] == ["validation", "test"]
    assert "TV %" not in lines[1]
    text = markdown("mine", STUDY, [*ROWS, *({**each, "dataset": "gaussians", "test_tv": 0.2} for each in ROWS)])
    assert "**Question.** Is it?" in text
    assert "csm bench research mine" in text
    assert text.count("| test (shown only) | a |") == 2
    assert text.count("TV %") == 1
    assert text.count("Least NLL on validation: `a`") == 2


def test_an_unknown_study_is_refused_before_anything_is_made(refused, tmp_path):
    said = refused("bench", "research", "nope", "--workspace", tmp_path / "w")
    assert said.startswith("STUDY: unknown 'nope'; one of amount, generator, guidance, images,")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Three classes of 2x2 pixels, one epoch."""
    data = {"source": "gaussians", "base": "synthetic", "classes": 3, "height": 2, "width": 2}
    values = {
        "data": {**data, "mean_scale": 1.0, "train": 90, "val": 60, "test": 150},
        "generator": {"kind": "gaussians"},
        "plan": {"ratios": 3, "sets_per_pair": 8, "shard_rows": 48},
        "annotate": {"members": 1, "annotator": "qda-pixels"},
        "train": {"optimizer": {"epochs": 1}},
        "evaluate": {"draws": 200},
    }
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_methods_are_compared_with_the_reference_whatever_workspace_they_are_in(path, serial, tmp_path, capfd):
    """Without mixed images: what the benchmark does with trainings, whatever they are."""
    root = tmp_path / "research"
    losses = {"brier": {"like": "brier"}, "focal": {"like": "focal", "method.parameters.gamma": 1.0}}
    two = {
        "losses": Study("Which loss?", "Brier.", (path,), losses, "cross-entropy"),
        "length": Study("How long?", "Long.", (path,), {"slow": {"train.optimizer.epochs": 2}}, "cross-entropy"),
    }
    findings = research(root, ["losses"], 2, studies=two)
    assert findings.failed == {}
    assert [(each["method"], each["run"], each["workspace"]) for each in findings.rows] == [
        ("cross-entropy", "cross-entropy", "small"),
        ("brier", "brier", "small"),
        ("focal", "losses.focal", "small"),
    ]
    said = capfd.readouterr().err
    assert "research: workspace 1 of 1, small: 3 methods x 2 seeds; 0 workspaces after it" in said
    for each in findings.rows:
        for split in ("val", "test"):
            values = []
            for seed in (0, 1):
                file = root / "small" / "runs" / f"{each['run']}-seed{seed}" / "predictions.parquet"
                frame = tables.read(file, tables.predictions(3)).filter(split=split)
                logits, labels = torch.from_numpy(frame["logits"].to_numpy().copy()), torch.tensor(frame["label"].to_list())
                values.append(evaluate(logits, labels, metrics=["nll"])["nll"])
            assert each[f"{split}_nll"] == pytest.approx(sum(values) / 2)
        assert (each["val_nll_minus"] is None) == (each["method"] == "cross-entropy")
        assert 0 < each["test_tv"] < 1
    reference, brier, _ = findings.rows
    assert brier["test_nll_minus"][0] == pytest.approx(brier["test_nll"] - reference["test_nll"])
    assert "Which loss?" in (root / "losses.md").read_text()

    serial.clear()
    both = research(root, [], 2, studies=two)
    assert [each["study"] for each in both.rows] == ["losses"] * 3 + ["length"] * 2
    assert both.rows[:3] == findings.rows
    slow = both.rows[-1]
    assert (slow["method"], slow["run"]) == ("slow", "cross-entropy")
    assert slow["workspace"].startswith("small-")
    assert serial == ["cross-entropy-seed0", "cross-entropy-seed1"]  # those of the workspace of its own
    said = capfd.readouterr().err
    assert f"workspace 2 of 2, {slow['workspace']} (train.optimizer.epochs 2): 1 methods x 2 seeds; 0 workspaces after it" in said
    assert said.count("prepare: reused") == 2  # taken over, not read again
    assert {each["study"] for each in json.loads((root / "research.json").read_text())} == {"losses", "length"}


def test_one_of_the_data_sets_is_measured_and_the_rows_of_the_other_stay(path, serial, tmp_path, capfd):
    other = Path(path).with_name("other.yaml")
    other.write_text(Path(path).read_text())
    two = {
        "losses": Study("Which loss?", "Brier.", (path, str(other)), {"brier": {"like": "brier"}}, "cross-entropy"),
        "here": Study("Here?", "Yes.", (path,), {"brier": {"like": "brier"}}, "cross-entropy"),
    }
    serial.clear()
    assert [row["dataset"] for row in research(tmp_path, [], 1, studies=two, datasets=["other"]).rows] == ["other"] * 2
    assert serial == ["cross-entropy-seed0", "brier-seed0"]
    found = research(tmp_path, ["losses"], 1, studies=two, datasets=["small"]).rows
    assert [row["dataset"] for row in found] == ["small"] * 2
    assert [row["dataset"] for row in json.loads((tmp_path / "research.json").read_text())] == ["other"] * 2 + ["small"] * 2
    assert "### other, 1 seeds" in (tmp_path / "losses.md").read_text()
    assert research(tmp_path, ["here", "losses"], 1, studies=two, datasets=["other"]).rows[0]["study"] == "losses"
    assert "research: here is not asked about other: left out" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"^--datasets: unknown 'other'; one of small$"):
        research(tmp_path, ["here"], 1, studies=two, datasets=["other"])


@pytest.mark.slow
@pytest.mark.ray
def test_images_are_taken_over_where_only_labels_differ(path, ray_address, tmp_path, capfd):
    images = {"few": {"plan.sets_per_pair": 4}, "members": {"annotate.members": 2, "method.mixed.annotator": "teacher"}}
    two = {"images": Study("How many?", "Many.", (path,), images)}
    findings = research(tmp_path / "research", [], 2, address=ray_address, studies=two)
    assert findings.failed == {}
    said = capfd.readouterr().err
    few, members = (next(each["workspace"] for each in findings.rows if each["method"] == name) for name in ("few", "members"))
    first, second = said.index(f"3, {few} (plan.sets_per_pair 4)"), said.index(f"3, {members} (annotate.members 2)")
    of_few, of_members = said[first : second if second > first else None], said[second : first if first > second else None]
    assert "mix: done" in of_few  # images of its own
    assert "mix: reused" in of_members  # the same images, another teacher


def test_a_study_that_does_not_fit_is_refused(path, tmp_path):
    wrong = {"wrong": Study("?", "!", (path,), {"a": {"method.mixed.wieght": 1}})}
    with pytest.raises(InputError, match=r"train.methods.wrong.a.mixed.wieght: no such setting"):
        research(tmp_path / "w", ["wrong"], 1, studies=wrong)
    assert not list(tmp_path.iterdir())
