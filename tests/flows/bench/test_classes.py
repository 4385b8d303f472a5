"""The figures of `csm bench classes` on few classes and images, and the law that they are measured on."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import multivariate_normal

from flows.bench.classes import classes
from flows.bench.gaussian_classes import ACCURACY, gaussian_classes
from flows.cli import cli

KEYS = ["classes", "top", "pairs", "sets", "images", "annotate_us", "annotate_ratio", "row_bytes", "label_bytes", "rest"]
KEYS += ["tv_lost", "tv_worst", "tv", "nll", "classifier_accuracy", "classifier_nll", "classifier_tv", "seconds"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    arguments = ["bench", "classes", "--classes", "4,24", "--top", "6,20", "--images", "480", "--json"]
    said = CliRunner().invoke(cli, arguments)
    assert said.exit_code == 0, said.output
    return json.loads(said.stdout.splitlines()[-1])


def test_a_row_for_each_number_of_classes_that_can_be_stored(rows: list[dict[str, float]]) -> None:
    assert [(row["classes"], row["top"]) for row in rows] == [(4, None), (24, None), (24, 6), (24, 20)]
    assert all(list(row) == KEYS for row in rows)
    assert [row["pairs"] for row in rows[:2]] == [6, pytest.approx(90, abs=30)]  # 5 near ones for each of 24
    assert all(row["images"] == 480 for row in rows)


def test_what_is_stored_loses_and_takes_less_the_more_and_the_fewer_classes_it_has(rows: list[dict[str, float]]) -> None:
    whole, few, most = rows[1:]
    assert whole["tv_lost"] == whole["tv_worst"] == whole["rest"] == 0
    assert few["rest"] > most["rest"] > 0
    assert few["tv_lost"] > most["tv_lost"]
    assert few["tv_lost"] <= few["tv_worst"] <= 1
    assert few["label_bytes"] == 6 * 8 + 4
    assert whole["label_bytes"] == 24 * 4
    assert few["row_bytes"] < whole["row_bytes"]
    assert abs(most["classifier_nll"] - whole["classifier_nll"]) < 0.05
    assert whole["annotate_ratio"] == 1
    assert few["annotate_ratio"] == pytest.approx(few["annotate_us"] / whole["annotate_us"])


def test_the_posterior_of_the_law_is_bayes_rule() -> None:
    law = gaussian_classes(5, torch.Generator().manual_seed(0))
    labels = torch.arange(5).repeat(400)
    images = law.draw(law.means[labels], torch.Generator().manual_seed(1))
    density = [
        multivariate_normal(mean.numpy(), law.deviation**2).logpdf(images.flatten(1).numpy().astype(float)) for mean in law.means
    ]
    expected = torch.from_numpy(np.stack(density, axis=1)).log_softmax(dim=1)
    found = law.log_posterior(images)
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found.argmax(dim=1) == labels).double().mean() == pytest.approx(ACCURACY, abs=0.04)


def test_one_class_is_none() -> None:
    said = CliRunner().invoke(cli, ["bench", "classes", "--classes", "1"])
    assert said.exit_code == 2
    assert "--classes 1: expected 2 at least" in said.stderr


@pytest.mark.slow
def test_of_a_thousand_classes_an_eighth_loses_nothing_measurable() -> None:
    whole, few, eighth = classes((1000,), (32, 128))
    assert eighth["label_bytes"] < whole["label_bytes"] / 3
    assert eighth["row_bytes"] < whole["row_bytes"] / 5
    assert abs(eighth["tv"] - whole["tv"]) < 0.001
    assert abs(eighth["classifier_nll"] - whole["classifier_nll"]) < 0.005
    assert few["tv"] - whole["tv"] > 0.005
