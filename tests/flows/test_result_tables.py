import polars as pl
import pytest
from rich.console import Console

from flows.result_tables import lowest, posthoc_table, shift_table, terminal_table
from flows.shift_summary import shift_tables
from flows.summary import NONE, TEMPERATURE, Method, summary_table
from tests.flows.measured import ECE, METHODS, NLL, comparison, metrics, shift_metrics


def printed(table, width):
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [100, 80])
def test_terminal_table_fits_and_marks_the_best_without_colour(width):
    methods = [*METHODS[:2], Method("csm_posterior_weight_4", "ours", is_ours=True)]
    frame = metrics().with_columns(pl.col("method").replace("csm", methods[2].name))
    text = printed(terminal_table(summary_table(frame, methods), methods), width)
    assert max(map(len, text)) <= width
    assert not any("…" in line for line in text)
    ours = [line for line in text if "csm_posterior" in line]
    assert "80.0±0.0*" in ours[0]  # NLL before
    assert "70.0±0.0*" in ours[1]
    assert "2.00" in ours[1]  # the fitted temperature
    focal = [line for line in text if line.startswith("focal")]
    assert "3.0±0.0*" in focal[0]
    assert "*" not in focal[1].replace("70.0±0.0*", "")  # accuracies are all equal and all best


def test_terminal_table_shows_a_dash_for_what_is_missing():
    text = printed(terminal_table(summary_table(metrics().filter(posthoc=NONE), METHODS), METHODS), 80)
    assert [word for word in text if word.startswith("csm")][1].split() == ["csm", *"------"]


@pytest.mark.parametrize("width", [110, 80])
def test_twenty_five_methods_with_intervals_marks_and_costs_stay_readable(width):
    names = [f"method-{index}" for index in range(24)]
    methods = [METHODS[0], *(Method(name, name) for name in names)]
    nll, ece = ({"ce": table["ce"], **{name: table["csm"] for name in names}} for table in (NLL, ECE))
    summary = summary_table(metrics(nll, ece), methods, comparison(dict.fromkeys(names, 0.01), methods=methods))
    cost = {method.name: 1234.5 for method in methods[1:]}
    text = printed(terminal_table(summary, methods, cost, "GPU s"), width)
    assert max(map(len, text)) <= width
    assert not any("…" in line for line in text)
    rows = {line.split()[0]: line.split() for line in reversed(text) if line[:1].isalpha()}  # the upper half last
    assert rows["method-7"][1:] == ["1", "70.0±2.0*†", "4.0±2.0*†", "4.0*", "80.0±2.0*†", "40.0±2.0*†", "1234"]
    assert rows["ce"][-1] == "-"
    words = " ".join(" ".join(text).split())
    assert "half of the 95 % interval over seeds and test images" in words
    assert "† differs from ce: p < 0.05" in words


def test_one_seed_has_intervals_over_images_and_nothing_is_compared_without_a_baseline():
    methods = METHODS[1:]
    table = comparison({}, methods=methods)
    words = " ".join(
        " ".join(printed(terminal_table(summary_table(metrics().filter(seed=0), methods, table), methods), 110)).split()
    )
    assert "half of the 95 % interval over test images; one seed" in words
    assert "†" not in words


def test_posthoc_methods_have_a_table_of_their_own_when_there_are_more_than_temperature():
    assert posthoc_table(summary_table(metrics(), METHODS), METHODS) is None
    vector = metrics().filter(posthoc=TEMPERATURE).with_columns(posthoc=pl.lit("vector"), value=pl.col("value") * 0.5)
    missing = (pl.col("posthoc") == "vector") & (pl.col("method") == "focal")
    summary = summary_table(pl.concat([metrics(), vector]).filter(~missing), METHODS)
    text = printed(posthoc_table(summary, METHODS), 80)
    assert text[0].split() == ["method", NONE, TEMPERATURE, "vector"]
    rows = [line.split() for line in text]
    assert ["ce", "ECE", "%", "15.0", "5.0", "2.5*"] in rows
    assert ["NLL", "×100", "120.0", "90.0", "45.0*"] in rows
    assert ["focal", "ECE", "%", "3.0*", "6.0", "-"] in rows
    assert lowest(summary, "csm", "nll", [NONE, "vector"]) == [("80.0", False), ("35.0", True)]


def test_shift_tables_on_a_terminal():
    tables = shift_tables(shift_metrics(), METHODS)
    text = [printed(shift_table(table), 80) for table in tables]
    assert text[0][0].strip() == "corrupted, as trained"
    assert all(max(map(len, lines)) <= 80 for lines in text)
    assert "mean over seeds and 2 corruptions" in " ".join(text[0])
    assert "AUROC ↑ %" in " ".join(text[2])
