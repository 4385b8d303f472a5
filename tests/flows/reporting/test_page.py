import base64
import io
import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from PIL import Image

from csm.search.importance import Importance
from csm.tables import METRICS
from flows import reporting
from flows.reliability import Predictions, Reliability
from flows.report_annotators import AnnotatorResult, AtRatio
from flows.report_run import FinishedModel, Repeat
from flows.report_sweep import lay_out
from flows.reporting import (
    Annotation,
    Cell,
    Dataset,
    MixedSet,
    Report,
    Stage,
    data_uri,
    duration,
    render,
)
from flows.summary import NONE, TEMPERATURE, Method
from tests.flows.measured import comparison, shift_metrics
from tests.flows.test_report_sweep import FRAME, PARAMETERS
from tests.flows.test_report_sweep import METRICS as TRIED

VOID = {"meta", "link", "img", "wbr", "br"}
METHODS = (
    Method("ce", "cross-entropy", is_baseline=True),
    Method("focal", "focal loss"),
    Method("csm_full", "semantic mixtures", is_ours=True),
)
NLL = {"ce": 1.236, "focal": 1.1, "csm_full": 0.9}
ECE = {"ce": 0.1234, "focal": 0.031, "csm_full": 0.042}


class Page(HTMLParser):
    """Elements in order, each with its attributes and the text inside it; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag
        if tag in {"td", "th", "b", "small", "div"}:
            self.handle_data(" ")

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attrs):
        return [e for e in self.elements if e["tag"] == tag and attrs.items() <= e["attrs"].items()]

    def text(self, tag, **attrs):
        return [" ".join(element["text"].split()) for element in self.all(tag, **attrs)]


def metrics(seeds=3):
    rows = []
    for name in NLL:
        for seed in range(seeds):
            for posthoc, factor in ((NONE, 1.0), (TEMPERATURE, 0.5)):
                nll, ece = NLL[name] * factor + seed / 100, ECE[name] * factor
                values = {"accuracy": 0.765, "ece": ece, "aece": ece, "nll": nll, "brier": nll / 2}
                for metric, value in values.items():
                    bins = 15 if metric.endswith("ece") else None
                    temperature = 1.0 if posthoc == NONE else 1.75
                    rows.append((f"{name}-{seed}", name, seed, "test", posthoc, temperature, metric, bins, value))
    return pl.DataFrame(rows, schema=dict(METRICS), orient="row")


def report(seeds=3, names=("cat", "dog", "<script>alert(1)</script>")):
    rng = np.random.default_rng(0)

    def picture():
        return rng.integers(0, 256, (8, 8, 1), dtype=np.uint8)

    confidence = rng.uniform(0.3, 1, 200)
    correct = rng.uniform(size=200) < confidence
    pair = Reliability(Predictions(confidence, correct), Predictions(confidence**2, correct))
    cells = [
        Cell(lam, picture(), {"projection": Annotation(lam, raw=0.8 * lam), "posterior": Annotation(lam**2, 0.25, names[2])})
        for lam in (1.0, 0.0, 0.5)  # not in order
    ]
    samples = [(name, [picture() for _ in range(3)]) for name in names]
    return Report(
        title="Mixing <b>digits</b>",
        created=datetime(2025, 3, 4, 5, 6),
        command="csm run --config digits & echo <done>",
        machine="2 cores",
        config_yaml="seed: 0\nname: '<digits>'\n",
        dataset=Dataset("digits", names, {"train": 900, "val": 150, "test": 1747}, (8, 8, 1)),
        stages=[Stage("prepare", 0.42, False, 1797), Stage("generator", 92.3, True, device_seconds=125)],
        methods=METHODS,
        metrics=metrics(seeds),
        reliability={method.name: pair for method in METHODS},
        gallery=[MixedSet(names[0], names[1], cells)],
        data_samples=samples,
        generator_samples=samples,
    )


@pytest.fixture(scope="module")
def html():
    return render(report())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def result_rows(page):
    """Return method -> cells of the results table: texts of accuracy to Brier at T = 1, then T, then again."""
    rows, cells, inside = {}, None, False
    for element in page.elements:
        if element["tag"] == "table":
            inside = element["attrs"].get("class") == "results"
        if element["tag"] == "th" and element["attrs"].get("scope") == "row" and cells is None and inside:
            cells = rows.setdefault(element["text"].split()[0], [])
        elif element["tag"] == "td" and cells is not None:
            cells.append(" ".join(element["text"].split()))
            cells = cells if len(cells) < 11 else None
    return rows


def test_nothing_is_loaded_from_elsewhere(html, page):
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = element["attrs"].get(name, "")
            assert value.startswith(("data:", "#")) or not value, (element["tag"], value)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    assert not page.all("script")
    assert not page.all("iframe")


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


def test_gallery_runs_from_class_b_to_class_a(page):
    assert "dog → cat" in page.text("h3")
    words = [element["attrs"]["aria-label"] for element in page.all("div", role="img", tabindex="0")]
    assert [text.partition(";")[0] for text in words] == [
        f"Mix of dog and cat, ratio of cat {lam}" for lam in ("0.00", "0.50", "1.00")
    ]
    assert words[1].partition("; ")[2] == (
        "projection: raw 0.40, calibrated 0.50; posterior: calibrated 0.25, 25 % outside the pair, most likely <script>alert(1)</script>"
    )
    tips = page.text("div", **{"class": "tip"})
    assert tips[1].startswith("ratio of cat in: 0.50 projection: raw 0.40, calibrated 0.50")
    cells = page.text("td", role="cell")
    assert cells[3:6] == ["0.00", "0.50", "1.00"]  # ratio that went in
    assert cells[9:12] == [f"{share} 25 % <script>alert(1)</script>" for share in ("0.00", "0.25", "1.00")]
    assert 'style="width:18.8%"' in render(report())  # 0.25 of the 0.75 within the pair


def test_shares_of_the_bars_under_an_image_sum_to_one(html):
    bars = re.findall(r'<div class="share".*?</div>', html)
    assert len(bars) == 6
    for bar in bars:
        assert sum(map(float, re.findall(r"width:([\d.]+)%", bar))) == pytest.approx(100, abs=0.2)


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


def test_small_pictures_keep_their_pixels_and_large_ones_are_photographs():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1])))
    assert np.array_equal(np.asarray(decoded), image)
    large = data_uri(np.zeros((400, 200, 1), np.uint8))
    assert Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))).size == (48, 96)
    assert 'class="px' not in render(replace(report(), dataset=replace(report().dataset, image_shape=(64, 64, 3))))
    assert " px" in render(report())


@pytest.mark.parametrize("image", [np.zeros((4, 4, 1)), np.zeros((4, 4, 2), np.uint8), np.zeros((4,), np.uint8)])
def test_pictures_of_other_kinds_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        data_uri(image)


def test_a_large_run_stays_under_two_megabytes_and_says_what_it_leaves_out():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    pictures = [np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)) for small in coarse]
    names = [f"class {index}" for index in range(200)]
    cells = [Cell(step / 7, pictures[step], {"posterior": Annotation(0.5, 0.1, "cat")}) for step in range(8)]
    samples = [(name, [picture] * 20) for name, picture in zip(names, pictures, strict=True)]
    big = replace(
        report(),
        dataset=Dataset("tiny-imagenet", names, {"test": 10_000}, (64, 64, 3)),
        gallery=[MixedSet("cat", "dog", cells)] * 50,
        data_samples=samples,
        generator_samples=samples,
    )
    text = render(big)
    assert len(text) < 2e6
    page = Page(text)
    assert page.text("h3").count("dog → cat") == reporting.MAX_SETS
    rows = [element for element in page.all("div") if element["attrs"].get("class") == "row"]
    assert len(rows) == 2 * reporting.MAX_CLASSES
    assert all(r["attrs"]["aria-label"].startswith(f"{reporting.MAX_SAMPLES} ") for r in rows)
    assert f"Shown are the first {reporting.MAX_SETS} of 50 sets." in text
    assert f"Shown are {reporting.MAX_CLASSES} of 200 classes." in text
    assert "and 180 more" in text


def test_missing_parts_are_left_out():
    empty = replace(report(), stages=[], metrics=metrics().clear(), reliability={}, gallery=[])
    page = Page(render(replace(empty, data_samples=[], generator_samples=[])))
    assert page.text("h2") == ["Results", "How to repeat it"]
    assert "None of them was measured." in page.text("p")[0]
    assert page.text("li")[:2] == ["Results", "How to repeat it"]


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


def test_a_healthy_page_has_no_stray_values(html):
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"base64,[^\"]*", "", html))


def test_before_and_after_without_a_fitted_temperature():
    only = {name: replace(pair, after=None) for name, pair in report().reliability.items()}
    page = Page(render(replace(report(), metrics=metrics().filter(posthoc=NONE), reliability=only)))
    assert result_rows(page)["ce"][5:] == ["–"] * 6
    assert not any("→" in text for text in page.text("text"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (92.3, "1 min 32 s"), (7384, "2 h 03 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def with_everything():
    """With a comparison, costs, one more post-hoc method and two shift sets."""
    p_holm = {"focal": 0.3, "csm_full": 0.02}
    vector = metrics().filter(posthoc=TEMPERATURE).with_columns(posthoc=pl.lit("vector"), value=pl.col("value") / 1.5)
    return replace(
        report(),
        metrics=pl.concat([metrics(), vector]),
        comparison=comparison(p_holm, methods=METHODS),
        shift_metrics=shift_metrics().with_columns(pl.col("method").replace("csm", "csm_full")),
        cost={"ce": 12.34, "focal": 1234.5},
        device="GPU s",
    )


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


def test_the_page_with_everything_is_accessible():
    text = render(with_everything())
    test_page_is_accessible(text, Page(text))
    test_a_healthy_page_has_no_stray_values(text)


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


def annotator():
    pair = report().reliability["ce"]
    curve = [AtRatio(lam, lam**2, lam / 2, lam, min(1.0, 2 * lam)) for lam in (0.0, 0.5, 1.0)]
    return AnnotatorResult(
        "posterior", "a classifier", "of all classes, as annotated", False, 150, 0.61234, 0.59, "a note", pair, curve
    )


def finished():
    uses = [("An HTTP service", "csm serve --model W/model")]
    return FinishedModel("csm_full-seed1", "csm_full", "1", "temperature (T = 1.04)", (8, 8, 1), [("ECE", "3.0 %")], "150", uses)


def repeated():
    commands = [
        ("What was typed", "csm run"),
        ("All of it again, from nothing", "csm run --config W/config.yaml --workspace again"),
    ]
    return Repeat(commands, {"csm": "0.1.0", "torch": "2.13.0"}, [("data set", "0123456789abcdef")])


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
