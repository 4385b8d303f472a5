"""Views of MLflow's runs page: columns, order and charts that are useful at once, kept as tags of the experiment.

The page takes a view from the experiment's tag ``mlflow.sharedViewState.KEY`` when its address ends in ``viewStateShareKey=KEY``, and
lists it under "Views". The tag is JSON: a name, two times and the state of the page as a text of JSON. What the state may hold is not
documented; it is as MLflow 3.17's page writes it, and ``tests/flows/test_ui.py`` looks whether the page still reads it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlflow.entities import Experiment, Run
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

TAG = "mlflow.sharedViewState."
RUNS = 500  # the newest, whose parameters and metrics are looked at
AXES = 6  # parameters of parallel coordinates
FIRST_COLUMNS = ("attributes.`Run Name`", "runDateAndNestInfo", "duration")  # the page always shows them
WIDTH = 110  # of other columns, in pixels


class View(NamedTuple):
    """A view: its key in the address, its name in the menu, the state of the page."""

    key: str
    name: str
    state: dict[str, Any]


def write_views(client: MlflowClient, experiment: Experiment) -> list[View]:
    """Keep the views that suit the runs of ``experiment`` as its tags, and return them.

    A view that is as it should be is not written again, and one that a user has saved under its name stays the user's.
    """
    views = views_of(client, experiment.experiment_id)
    for view in views:
        state = json.dumps(view.state)
        kept = experiment.tags.get(f"{TAG}{view.key}")
        if kept is None or (_is_ours(kept) and json.loads(kept)["state"] != state):
            now = int(time.time() * 1000)
            value = {"name": view.name, "createdAt": now, "updatedAt": now, "state": state, "by": "csm"}
            client.set_experiment_tag(experiment.experiment_id, f"{TAG}{view.key}", json.dumps(value))
    return views


def _is_ours(tag: str) -> bool:
    """MLflow's page writes a view without the mark."""
    return tag.startswith("{") and json.loads(tag).get("by") == "csm"


def views_of(client: MlflowClient, experiment: str) -> list[View]:
    """``trials`` of the newest sweep, if there is one, ``methods`` (means over seeds) and ``classifiers``."""
    trials = _runs(client, experiment, "trial")
    classifiers = _runs(client, experiment, "classifier")
    views = [_classifiers(classifiers), _methods(classifiers)]
    return [_trials(trials), *views] if trials else views


def _runs(client: MlflowClient, experiment: str, kind: str) -> list[Run]:
    """The newest runs of that kind; of trials, those of the newest sweep."""
    found = client.search_runs([experiment], _kind(kind), max_results=RUNS, order_by=["attributes.start_time DESC"])
    if kind == "trial":
        return [run for run in found if _sweep(run) == _sweep(found[0])]
    return list(found)


def _classifiers(runs: Sequence[Run]) -> View:
    state = _state(
        _kind("classifier"),
        columns=[*_tags("method", "seed", "loss", "annotator"), *_metrics(*TEST, *AFTER), _metric("temperature")],
        order="test_nll",
        charts=[*_test_charts(), _parallel(_axes(_varying(runs), runs), ["test_accuracy", "test_ece", "test_nll"])],
    )
    return View("classifiers", "Classifiers", state)


def _methods(runs: Sequence[Run]) -> View:
    by_method = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "csm.method"}]}
    state = _state(
        _kind("classifier"),
        columns=[*_metrics(*TEST, *AFTER), _metric("temperature")],
        order="test_nll",
        charts=_test_charts(),
        more={"groupBy": by_method},
    )
    return View("methods", "Methods (means over seeds)", state)


def _trials(runs: Sequence[Run]) -> View:
    """The charts are of what the sweep searched and of the objectives that it measured on validation."""
    searched = _varying(runs)
    seen = dict.fromkeys(name for run in runs for name in run.data.metrics if name.startswith("val_"))
    objectives = [name for name in ("val_nll", "val_ece", "val_accuracy") if name in seen] or list(seen)[:3]
    sweep = _sweep(runs[0])
    state = _state(
        _kind("trial") + (f" AND tags.`{MLFLOW_PARENT_RUN_ID}` = '{sweep}'" if sweep else ""),
        columns=[*(_column("params", name) for name in searched), *_metrics(*objectives)],
        order=objectives[0] if objectives else "val_nll",
        charts=[
            _parallel(_axes(searched, runs), objectives),
            *([_scatter("val_accuracy", "val_ece")] if {"val_accuracy", "val_ece"} <= set(seen) else []),
            *(_bar(name) for name in objectives),
        ],
        more={"runsHiddenMode": "SHOW_ALL"},
    )
    return View("trials", "Trials of the newest sweep", state)


TEST = ("test_accuracy", "test_ece", "test_nll", "test_brier")
AFTER = ("test_ece_temperature", "test_nll_temperature")


def _test_charts() -> list[dict[str, Any]]:
    bars = [_bar(name) for name in ("test_ece", "test_nll", "test_accuracy", "test_ece_temperature")]
    return [*bars, _scatter("test_accuracy", "test_ece"), _line("loss")]


def _state(
    search: str, columns: Sequence[str], order: str, charts: Sequence[Mapping[str, Any]], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The page's state. It adds a chart of every other metric by itself: into its own sections, which are closed and below."""
    sections = [("csm", "Calibration", True), ("metrics", "Model metrics", False), ("system", "System metrics", False)]
    return {
        "searchFilter": search,
        "orderByKey": _metric(order),
        "orderByAsc": not order.endswith("accuracy"),
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(columns),
        "columnOrder": [*FIRST_COLUMNS, *columns],
        "columnWidths": {name: WIDTH for name in columns},
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunCharts": [{**chart, "metricSectionId": "csm", "deleted": False, "isGenerated": False} for chart in charts],
        "compareRunSections": [
            {
                "uuid": uuid,
                "name": name,
                "display": display,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
                "columns": 2,
            }
            for uuid, name, display in sections
        ],
        "isAccordionReordered": True,
        **(more or {}),
    }


def _bar(metric: str) -> dict[str, Any]:
    return {"type": "BAR", "uuid": f"bar-{metric}", "runsCountToCompare": 20, "metricKey": metric}


def _line(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"line-{metric}",
        "runsCountToCompare": 20,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _scatter(x: str, y: str) -> dict[str, Any]:
    axes = {name: {"key": key, "type": "METRIC"} for name, key in (("xaxis", x), ("yaxis", y))}
    return {"type": "SCATTER", "uuid": f"scatter-{x}-{y}", "runsCountToCompare": 100, **axes}


def _parallel(params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "PARALLEL",
        "uuid": "parallel",
        "runsCountToCompare": 100,
        "selectedParams": list(params),
        "selectedMetrics": list(metrics),
        "showAllRuns": True,
    }


def _axes(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Those of ``names`` for parallel coordinates: what all runs have, if anything, as the page draws no line of a run that lacks one."""
    whole = [name for name in names if all(name in run.data.params for run in runs)]
    return (whole or list(names))[:AXES]


def _varying(runs: Sequence[Run]) -> list[str]:
    """Parameters that not all ``runs`` have alike, those in most of them first."""
    names = dict.fromkeys(name for run in runs for name in run.data.params if name != "description")
    values = {name: [run.data.params.get(name) for run in runs] for name in names}
    varying = [name for name in names if len(set(values[name])) > 1]
    return sorted(varying, key=lambda name: values[name].count(None))


def _kind(kind: str) -> str:
    return f"tags.`csm.kind` = '{kind}'"


def _sweep(run: Run) -> str:
    return str(run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""))


def _tags(*names: str) -> list[str]:
    return [_column("tags", f"csm.{name}") for name in names]


def _metrics(*names: str) -> list[str]:
    return [_metric(name) for name in names]


def _metric(name: str) -> str:
    return _column("metrics", name)


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"
