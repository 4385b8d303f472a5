"""A report with every part that a run can give it, and its page taken apart."""

from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser

import numpy as np
import polars as pl

from csm.tables import METRICS
from flows.reliability import Predictions, Reliability
from flows.report_annotators import AnnotatorResult, AtRatio
from flows.report_run import FinishedModel, Repeat
from flows.reporting import Annotation, Cell, Dataset, MixedSet, Report, Stage
from flows.summary import NONE, TEMPERATURE, Method
from tests.flows.measured import comparison, shift_metrics

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
