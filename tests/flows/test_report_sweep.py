import polars as pl
import pytest

from csm import storage, tables
from csm.errors import InputError
from csm.search.importance import Importance
from flows.report_sweep import lay_out, read_sweep
from flows.sweep_records import SweepFolder

PARAMETERS = ("method", "train.optimizer.learning_rate", "method.mixed.weight")
METRICS = ("nll", "accuracy", "ece")
DTYPES = dict(zip(PARAMETERS, (pl.String(), pl.Float64(), pl.Float64()), strict=True))


def trial(number, rank=None, nll=None, accuracy=None, ece=None, pareto=None, status="done", error=None, test=False, weight=None):
    row = dict.fromkeys(tables.sweep(DTYPES, METRICS))
    row |= {
        "trial": number,
        "status": status,
        "error": error,
        "seeds": 2,
        "epochs": 10,
        "seconds": 1.5,
        "rank": rank,
        "pareto": pareto,
    }
    row |= {"param.method": "csm" if weight else "ce", "param.train.optimizer.learning_rate": 0.001 * 10**number}
    row["param.method.mixed.weight"] = weight
    for split in ("val", "test") if test else ("val",):
        for metric, value in zip(METRICS, (nll, accuracy, ece), strict=True):
            if value is not None:
                row |= {f"{split}.{metric}": value, f"{split}.{metric}.low": value - 0.01, f"{split}.{metric}.high": value + 0.01}
    return row


ROWS = [
    trial(0, 3, 0.9, 0.70, 0.02, True, test=True),
    trial(1, 2, 0.7, 0.75, 0.06, False, weight=2.0),
    trial(2, 1, 0.5, 0.80, 0.04, True, weight=4.0, test=True),
    trial(3, status="failed", error="RuntimeError: not finite <b>"),
    trial(4, nll=0.95, accuracy=0.6, ece=0.1, status="stopped"),
]
SCHEMA = tables.sweep(DTYPES, METRICS)
FRAME = pl.DataFrame(ROWS, schema=dict(SCHEMA))


@pytest.fixture
def sweep():
    return lay_out(FRAME, PARAMETERS, METRICS, [])


def test_counts_best_and_order(sweep):
    assert (sweep.trials, sweep.failed, sweep.stopped, sweep.objective) == (5, 1, 1, "NLL ×100")
    assert sweep.best.number == 2
    assert [trial.number for trial in sweep.top] == [2, 1, 0]
    assert [trial.pareto for trial in sweep.top] == [True, False, True]


def test_figures_are_times_100_with_their_interval_and_test_only_where_measured(sweep):
    assert sweep.heads == [
        "validation NLL ×100",
        "validation Accuracy %",
        "validation ECE %",
        "test NLL ×100",
        "test Accuracy %",
        "test ECE %",
    ]
    assert sweep.best.figures == ["50.0 (49.0 to 51.0)", "80.0 (79.0 to 81.0)", "4.0 (3.0 to 5.0)"] * 2
    assert sweep.top[1].figures[3:] == ["", "", ""]


def test_settings_are_short_and_idle_ones_left_out(sweep):
    assert sweep.top[2].settings == [("method", "ce"), ("learning_rate", "0.001")]
    assert sweep.best.settings == [("method", "csm"), ("learning_rate", "0.1"), ("weight", "4")]


def test_failures_are_listed_with_their_error(sweep):
    (failure,) = sweep.failures
    assert (failure.number, failure.error) == (3, "RuntimeError: not finite <b>")


def test_plots_show_every_trial_that_was_measured(sweep):
    assert [dot.kind for dot in sweep.progress.dots] == ["front", "other", "first", "stopped"]
    down = [y for _, y in sweep.progress.line]
    assert down == sorted(down)  # y grows downwards: the best so far only falls
    assert len(sweep.front.dots) == 3  # of those that came to their end
    assert [plot.title for plot in sweep.parameters] == list(PARAMETERS)
    assert [text for _, text in sweep.parameters[0].x_ticks] == ["ce", "csm"]
    assert [text for _, text in sweep.parameters[1].x_ticks] == ["0.001", "0.01", "0.1", "1", "10"]  # logarithmic


def test_a_sweep_in_which_nothing_finished():
    failed = pl.DataFrame([trial(0, status="failed", error="out of memory")], schema=dict(SCHEMA))
    sweep = lay_out(failed, PARAMETERS, METRICS, [])
    assert (sweep.best, sweep.progress, sweep.front, sweep.parameters) == (None, None, None, [])


def test_the_workspace_is_read(tmp_path):
    assert read_sweep(tmp_path) is None
    folder = SweepFolder(tmp_path)
    tables.write(FRAME, folder.table, SCHEMA)
    assert read_sweep(tmp_path).importance == []  # of a sweep that was too short
    found = [Importance("method", "", 0.4, 12), Importance("method.loss", 'method="csm"', 0.1, 10)]
    storage.write_json(folder.importance, [item._asdict() for item in found])
    assert read_sweep(tmp_path).importance == [("method", "", 0.4), ("method.loss", 'method="csm"', 0.1)]
    folder.table.write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match="is not a whole parquet file"):
        read_sweep(tmp_path)
    pl.DataFrame({"trial": [1]}).write_parquet(folder.table)
    with pytest.raises(InputError, match="expected columns"):
        read_sweep(tmp_path)
