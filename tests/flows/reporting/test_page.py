"""The page as a whole, and the parts of it that not every run has."""

import re
from dataclasses import replace
from itertools import pairwise

import polars as pl
import pytest

from csm.search.importance import Importance
from flows.report_sweep import lay_out
from flows.reporting import duration, render
from tests.flows.reported import METHODS, Page, annotator, finished, metrics, repeated, report, with_everything
from tests.flows.test_report_sweep import FRAME, PARAMETERS
from tests.flows.test_report_sweep import METRICS as TRIED


def test_nothing_is_loaded_from_elsewhere(html, page):
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = element["attrs"].get(name, "")
            assert value.startswith(("data:", "#")) or not value, (element["tag"], value)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert not page.all("script")
    assert not page.all("iframe")


def test_texts_from_the_run_are_escaped(html, page):
    assert "<script" not in html
    assert "<b>digits</b>" not in html
    assert "<script>alert(1)</script>" in page.text("th", scope="row")
    assert page.text("h1") == ["Mixing <b>digits</b>"]
    assert "csm run --config digits & echo <done>" in page.text("code")
    assert any("name: '<digits>'" in text for text in page.text("code"))
    hostile = "<img src=x onerror=alert(1)>"
    methods = [replace(METHODS[0], name=hostile), *METHODS[1:]]
    frame = metrics().with_columns(pl.col("method").replace("ce", hostile))
    assert "<img src=x" not in render(replace(report(), methods=methods, metrics=frame, reliability={}))


def test_page_is_accessible(html, page):
    assert page.all("html", lang="en")
    assert all("alt" in element["attrs"] for element in page.all("img"))
    for element in page.all("img", alt=""):  # a picture without words lies in a figure that has them
        assert "div" in element["inside"]
    assert all(element["attrs"].get("scope") for element in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    levels = [int(element["tag"][1]) for element in page.elements if re.fullmatch(r"h\d", element["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = [element["attrs"]["id"] for element in page.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))
    targets = {element["attrs"]["href"][1:] for element in page.all("a")}
    assert targets <= set(ids)
    assert all(len(element["attrs"]["aria-label"]) > 10 for element in page.all("svg", role="img"))


def luminance(colour):
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough_in_both_themes(html, theme):
    blocks = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): #(\w+);", blocks[theme]))

    def contrast(front, back):
        low, high = sorted(luminance(colours[name]) for name in (front, back))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "soft", "before", "after", "a"):  # WCAG 2.2, 1.4.3
        assert contrast(text, "page") >= 4.5
    for text in ("ink", "soft", "a"):
        assert contrast(text, "own") >= 4.5
    assert contrast("ink", "panel") >= 4.5
    for line in ("c0", "c1", "c2", "c3", "c4", "out"):  # 1.4.11
        assert contrast(line, "page") >= 3
    assert contrast("a", "b") >= 3


def test_what_was_run_is_told(page):
    rows = page.text("tr")
    assert "prepare ran 1,797 0.4 s –" in rows
    assert "generator reused – 1 min 32 s 2 min 05 s" in rows
    assert "all 1 min 33 s" in rows
    assert "machine 2 cores" in rows
    assert "test 1,747 images" in rows
    assert page.all("time", datetime="2025-03-04T05:06:00")


def test_missing_parts_are_left_out():
    empty = replace(report(), stages=[], metrics=metrics().clear(), reliability={}, gallery=[])
    page = Page(render(replace(empty, data_samples=[], generator_samples=[])))
    assert page.text("h2") == ["Results", "How to repeat it"]
    assert "None of them was measured." in page.text("p")[0]
    assert page.text("li")[:2] == ["Results", "How to repeat it"]


def test_a_healthy_page_has_no_stray_values(html):
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"base64,[^\"]*", "", html))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (92.3, "1 min 32 s"), (7384, "2 h 03 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_page_with_everything_is_accessible():
    text = render(with_everything())
    test_page_is_accessible(text, Page(text))
    test_a_healthy_page_has_no_stray_values(text)


def test_annotators_have_a_table_and_their_plots():
    assert "annotators" not in render(report())
    text = render(
        replace(report(), annotators=[annotator(), replace(annotator(), name="pairs", nll_before=None, reliability=None)])
    )
    page = Page(text)
    rows = page.text("tr")
    assert "posterior a classifier 0.612 0.590 all 150" in rows
    assert "pairs a classifier – 0.590 all 150" in rows
    labels = [element["attrs"]["aria-label"] for element in page.all("svg", role="img")]
    assert next(label for label in labels if label.startswith("posterior: mean confidence")).endswith(
        "0.50 in 0.50 out, 1.00 in 1.00 out"
    )
    assert sum("after calibration" in label for label in labels) == 1  # one that knows only the pair has no reliability
    assert "Labels of all classes, as annotated. a note." in page.text("p")
    test_page_is_accessible(text, page)


def test_a_sweep_is_told_with_its_failures():
    sweep = lay_out(FRAME, PARAMETERS, TRIED, [Importance("method", "a=b", 0.4, 5)])
    text = render(replace(report(), sweep=sweep))
    page = Page(text)
    words = " ".join(page.text("p"))
    assert (
        "5 configurations were tried (trials), 1 of them stopped early because others did better, 1 failed; ranked by NLL"
        in words
    )
    assert page.text("div", **{"class": "chosen"})[0].startswith("Best: trial 2. method = csm , learning_rate = 0.1")
    assert any(row.startswith("3 RuntimeError: not finite <b> method = ce") for row in page.text("tr"))
    assert "method (beside a=b)40 %" in page.text("li")
    assert "<b> method" not in text  # escaped
    test_page_is_accessible(text, page)
    test_a_healthy_page_has_no_stray_values(text)


def test_a_sweep_without_a_finished_trial_is_told():
    nothing = lay_out(FRAME.filter(status="failed"), PARAMETERS, TRIED, [])
    assert "No trial came to its end, so there is no best one." in render(replace(report(), sweep=nothing))


def test_the_finished_model_and_how_to_repeat_it():
    text = render(replace(report(), model=finished(), repeat=repeated()))
    page = Page(text)
    assert "The finished model" in page.text("h2")
    assert "ECE 3.0 %" in page.text("tr")
    code = page.text("code")
    assert {"csm serve --model W/model", "csm run --config W/config.yaml --workspace again", "0123456789abcdef"} <= set(code)
    assert "versions csm 0.1.0, torch 2.13.0" in page.text("tr")
    test_page_is_accessible(text, page)
