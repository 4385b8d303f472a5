"""What the page says of the methods: the tables, the diagrams, and the words before them."""

import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from flows.reliability import Predictions, Reliability
from flows.reporting import render
from flows.summary import NONE, Method
from tests.flows.reported import METHODS, Page, metrics, report, result_rows, with_everything


def test_every_method_has_a_row_a_diagram_and_its_description(page):
    assert list(result_rows(page))[:3] == [method.name for method in METHODS]
    headings = page.text("h3")
    for method in METHODS:
        assert any(text.startswith(method.name) for text in headings)
        assert sum(method.description in element["text"] for element in page.all("figcaption")) == 1
    diagrams = [e for e in page.all("svg", role="img") if e["attrs"]["aria-label"].startswith("Reliability")]
    assert len(diagrams) == len(METHODS)


def test_values_are_in_per_cent_and_times_100(page):
    cells = result_rows(page)["ce"]
    assert cells[:5] == ["★76.5±0.0 best", "12.3±0.0", "12.3±0.0", "124.6±1.0", "62.3±0.5"]
    assert cells[5] == "1.75±0.00"
    assert cells[6:] == ["★76.5±0.0 best", "6.2±0.0", "6.2±0.0", "62.8±1.0", "31.4±0.5"]
    headers = page.text("th", scope="col")
    headers = headers[headers.index("Method") :]
    assert headers[1:6] == [
        "Accuracy % ↑, higher is better",
        "ECE % ↓, lower is better",
        "AECE % ↓, lower is better",
        "NLL ×100 ↓, lower is better",
        "Brier ×100 ↓, lower is better",
    ]


def test_the_best_of_a_column_and_nothing_else_is_marked(page):
    stars = {name: [index for index, cell in enumerate(cells) if "★" in cell] for name, cells in result_rows(page).items()}
    accuracy = [0, 6]  # the same for all, so all are best
    assert stars["ce"] == accuracy
    assert stars["focal"] == sorted([*accuracy, 1, 2, 7, 8])
    assert stars["csm_full"] == sorted([*accuracy, 3, 4, 9, 10])
    bold = [element for element in page.all("td") if element["attrs"].get("class") == "best"]
    assert len(bold) == sum(map(len, stars.values()))


def test_one_seed_shows_no_spread():
    page = Page(render(report(seeds=1)))
    assert "±" not in "".join(element["text"] for element in page.elements if element["tag"] != "style")
    assert result_rows(page)["ce"][3] == "123.6"
    assert "were tried, once, and measured" in page.text("p")[0]
    assert any(text.startswith("Each was trained once.") for text in page.text("li"))


def test_lead_says_who_wins_in_numbers(page):
    lead, meaning, *_ = (text.replace("\u00a0", " ").replace(" ,", ",") for text in page.text("p"))
    assert lead == (
        "3 ways of training a classifier on digits (3 classes) were tried, each 3 times with another random start, and measured on "
        "1,747 images that none of them had seen. Best is csm_full, with the fitted temperature: its probabilities fit what is true "
        "better than those of the others (lowest NLL). It names the right class in 76.5 % of the images, ce in 76.5 %."
    )
    assert (
        meaning == "On the whole it is too unsure by 15 points: it says 50 % on average and is right in 66 %."
    )  # few near any level
    lead = page.text("p", **{"class": "details"})[0].replace("\u00a0", " ")
    assert "csm_full has the lowest NLL, 91.0 ± 1.0 (×100) against 124.6 ± 1.0 for ce (lower with all 3 seeds)" in lead
    assert "focal has the lowest ECE, 3.1 ± 0.0 % against 12.3 ± 0.0 %" in lead
    assert "comes first in 2 of 4 comparisons" in page.text("p", **{"class": "details"})[0]


def test_ece_in_a_diagram_is_that_of_the_pooled_predictions():
    confidence = np.array([0.9, 0.9, 0.9, 0.9])
    correct = np.array([True, True, False, False])
    pair = Reliability(Predictions(confidence, correct), Predictions(confidence - 0.35, correct))
    page = Page(render(replace(report(), reliability={"ce": pair})))
    assert "ECE 40.0 % → 5.0 %" in page.text("text")
    assert any("ECE 40.0 % before and 5.0 % after" in e["attrs"]["aria-label"] for e in page.all("svg", role="img"))


def test_a_diverged_run_is_told_not_hidden():
    broken = pl.when((pl.col("method") == "focal") & (pl.col("metric") != "accuracy")).then(float("nan"))
    nothing = Predictions(np.full(5, np.nan), np.zeros(5, bool))
    text = render(
        replace(
            report(),
            metrics=metrics().with_columns(value=broken.otherwise("value")),
            reliability={**report().reliability, "focal": Reliability(nothing)},
        )
    )
    page = Page(text)
    assert result_rows(page)["focal"][1:5] == ["–"] * 4
    assert "A dash stands for a value that was not measured" in text
    assert "No diagram: its predictions are not finite." in text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"base64,[^\"]*", "", text))


def test_before_and_after_without_a_fitted_temperature():
    only = {name: replace(pair, after=None) for name, pair in report().reliability.items()}
    page = Page(render(replace(report(), metrics=metrics().filter(posthoc=NONE), reliability=only)))
    assert result_rows(page)["ce"][5:] == ["–"] * 6
    assert not any("→" in text for text in page.text("text"))


@pytest.fixture(scope="module")
def full():
    return Page(render(with_everything()))


def test_intervals_significance_and_cost_are_in_the_table(full):
    cells = result_rows(full)["csm_full"]
    assert cells[:5] == ["★76.5†49.0–53.0 best", "4.2†49.0–53.0", "4.2±0.0", "★91.0†49.0–53.0 best", "★45.5†49.0–53.0 best"]
    assert result_rows(full)["focal"][3] == "111.0" + "49.0–53.0"
    rows = full.text("tr")
    assert "ce 12 s" in rows
    rows = [row for row in rows if "76.5" in row]
    assert next(row for row in rows if row.startswith("ce")).endswith(" 12.3")
    assert next(row for row in rows if row.startswith("focal")).endswith(" 1234")
    assert next(row for row in rows if row.startswith("csm_full")).endswith(" –")
    intro = next(text for text in full.text("p") if text.startswith("Mean over seeds, below it"))
    assert "95 % interval (bootstrap over seeds and test images), or ± the standard deviation over seeds." in intro
    assert "† differs from ce, p < 0.05 (paired bootstrap, Holm-corrected for all methods)." in intro
    assert "Cost: GPU-seconds of training one classifier, or all members of an ensemble; mean over seeds." in intro


def test_without_a_comparison_nothing_is_said_of_chance(page):
    words = " ".join(page.text("p"))
    assert "†" not in words
    assert "bootstrap" not in words
    assert page.text("h2") == ["In plain words", "Results", "Reliability", "Mixed images", "Samples", "Cost", "How to repeat it"]


def test_posthoc_methods_and_shift_sets_have_tables(full):
    assert full.text("h2")[:5] == ["In plain words", "Results", "Post-hoc methods", "Under shift", "Reliability"]
    rows = full.text("tr")
    assert "focal 3.1 1.6 1.0 lowest 111.0 56.0 37.3 lowest" in rows
    assert [text for text in full.text("h3") if "corrupted" in text] == [
        "corrupted, as trained",
        "corrupted, with the fitted temperature",
    ]
    assert "csm_full 73.0 best 33.0 best 27.0 best 67.0 best 127.0 best 167.0 best" in rows
    assert "csm_full 82.0 best 42.0" in rows
    assert any("2 corruptions: blur, noise; columns are severities." in text for text in full.text("p"))


def test_a_smooth_curve_with_its_band_lies_over_the_bars(html):
    curves = re.findall(r'class="curve-of (\w+)" d="([^"]*)"', html)
    assert [side for side, _ in curves].count("before") > len(METHODS)  # one in the key
    ends = [tuple(map(float, point.split())) for point in re.split("[ML]", curves[-1][1])[1:]]
    assert all(40 <= x <= 330 and 8 <= y <= 298 for x, y in ends)  # inside the diagram
    assert [x for x, _ in ends] == sorted(x for x, _ in ends)
    assert len(re.findall(r'class="band after"', html)) == len(re.findall(r'class="curve-of after"', html))


def test_thirty_methods_stay_under_two_megabytes():
    names = [f"method-{index}" for index in range(30)]
    frame = metrics().filter(method="focal")
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, (3, 100))
    pair = Reliability(Predictions(confidence, confidence > 0.5), Predictions(confidence**2, confidence > 0.5))
    many = replace(
        report(),
        methods=[Method(name, "a few words on what it is trained with") for name in names],
        metrics=pl.concat(frame.with_columns(method=pl.lit(name)) for name in names),
        reliability=dict.fromkeys(names, pair),
    )
    text = render(many)
    assert len(text) < 2e6
    assert 'class="multiples many"' in text
