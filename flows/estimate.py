"""plan --estimate: device-hours and money of a configuration, stage by stage, before they are spent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cluster.session import require_answer, session
from csm.datasets import RealDataset
from csm.errors import InputError
from flows.artifacts import Workspace
from flows.config import Config
from flows.estimate_loads import Load, loads
from flows.estimate_rates import Rate, measured, recorded
from flows.progress import say

KINDS = ("gpu", "core")
ASSUMED = (
    "all of the work, also what is done already",
    "workers that are always busy; no machine is lost, so nothing is done twice",
    "a training of several workers is as many times faster",
    "prepare, plan, fitting heads, shift, evaluate and report are not counted: they take minutes of one core",
)


@dataclass(frozen=True)
class Row:
    """What a stage costs: hours of devices of ``load.kind`` and of the clock, and money; None where that is not known or not asked."""

    load: Load
    rate: Rate
    device_hours: float | None
    hours: float | None
    cost: float | None


def estimate(
    config: Config,
    root: Path,
    address: str = "local",
    rates: Mapping[str, float] | None = None,
    prices: Mapping[str, float] | None = None,
    devices: int | None = None,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Return what `csm plan --estimate --json` prints, see ``docs/cluster.md``.

    A stage's rate is the one given, else that of the workspace's own work, else it is measured; nothing is written.

    Args:
        config: whose work is estimated, the whole of it.
        root: workspace in which `prepare` was run.
        address: of the Ray cluster whose workers measure; "local": this process.
        rates: stage -> images a second of one worker.
        prices: of ``KINDS`` -> money for a device-hour.
        devices: of each kind, for the hours that it takes.
        seconds: length of a measurement, about; 0 measures nothing.

    Raises:
        InputError: `prepare` was not run, a stage of ``rates`` has no work here, or a worker takes more than ``devices``.
    """
    workspace, given, prices = Workspace(root), rates or {}, prices or {}
    if not workspace.dataset.is_file():
        raise InputError(f"--workspace {root}: an estimate needs to know the data: run `csm prepare` with the same options first")
    require_answer(address)
    todo = loads(config, RealDataset.load_info(root))
    for stage in given:
        if stage not in [load.stage for load in todo]:
            raise InputError(f"--rate {stage}: no such work here; one of {', '.join(load.stage for load in todo)}")
    known = {load.stage: _known(workspace, config, load, given) for load in todo}
    unknown = [load for load in todo if known[load.stage] is None]
    if unknown and seconds:
        known |= _measure(workspace, config, unknown, address, seconds)
    nothing = Rate(None, "unknown", "not measured")
    rows = [_row(load, known[load.stage] or nothing, prices, devices) for load in todo]
    return _as_json(rows, prices, devices)


def _known(workspace: Workspace, config: Config, load: Load, given: Mapping[str, float]) -> Rate | None:
    return Rate(given[load.stage], "given", "--rate") if load.stage in given else recorded(workspace, config, load)


def _measure(workspace: Workspace, config: Config, todo: Sequence[Load], address: str, seconds: float) -> dict[str, Rate]:
    found = {}

    def measure_all(on_cluster: bool) -> None:
        for load in todo:
            say(f"measuring {load.stage}")
            found[load.stage] = measured(workspace, config, load, on_cluster, seconds)

    if address == "local":
        measure_all(False)
    else:
        with session(address):
            measure_all(True)
    return found


def _row(load: Load, rate: Rate, prices: Mapping[str, float], devices: int | None) -> Row:
    if rate.images_per_s is None:
        return Row(load, rate, None, None, None)
    device_hours = load.images / rate.images_per_s * load.devices / 3600
    price = prices.get(load.kind)
    return Row(
        load, rate, device_hours, _hours(load, rate.images_per_s, devices), None if price is None else price * device_hours
    )


def _hours(load: Load, rate: float, devices: int | None) -> float | None:
    """Of the clock, on so many devices: those that all workers need, but not less than the longest piece takes."""
    if devices is None:
        return None
    room = int(devices / load.devices + 1e-6)
    workers = min(room, load.workers) if load.workers else room
    if workers < load.together:
        needed = f"{load.together} x {load.devices:g}"
        raise InputError(f"--devices {devices}: {load.stage} needs {needed} {load.kind}s at least; give more, or lower resources")
    pieces = workers // load.together * load.together
    return max(load.images / pieces, load.longest / load.together) / rate / 3600


def _as_json(rows: Sequence[Row], prices: Mapping[str, float], devices: int | None) -> dict[str, Any]:
    known = [row for row in rows if row.device_hours is not None]
    stages = [
        {
            "stage": row.load.stage,
            "work": row.load.what,
            "images": round(row.load.images),
            "images_per_s": row.rate.images_per_s,
            "source": row.rate.source,
            "note": row.rate.note,
            "device": row.load.kind,
            "devices_of_worker": row.load.devices,
            "device_hours": row.device_hours,
            "hours": row.hours,
            "cost": row.cost,
        }
        for row in rows
    ]
    hours = {kind: sum(row.device_hours or 0 for row in known if row.load.kind == kind) for kind in KINDS}
    return {
        "stages": stages,
        "device_hours": {kind: value for kind, value in hours.items() if any(row.load.kind == kind for row in rows)},
        "hours": None if devices is None else sum(row.hours or 0 for row in known),
        "cost": sum(row.cost for row in known if row.cost is not None) if prices else None,
        "devices": devices,
        "prices": dict(prices),
        "not_counted": [row.load.stage for row in rows if row.device_hours is None],
        "without_price": sorted({row.load.kind for row in rows} - set(prices)) if prices else [],
        "assumed": list(ASSUMED),
    }


def estimate_table(found: Mapping[str, Any]) -> Table:
    """What ``estimate`` returned, for a terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    table.add_column("work", overflow="fold", ratio=1)
    table.add_column("images/s\nof a worker", justify="right", no_wrap=True)
    table.add_column("device-hours", justify="right", no_wrap=True)
    if found["devices"] is not None:
        table.add_column(f"hours on\n{found['devices']} devices", justify="right", no_wrap=True)
    if found["prices"]:
        table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    for row in found["stages"]:
        rate, spent = _text(row["images_per_s"]), _text(row["device_hours"])
        texts = [row["stage"], row["work"], rate, f"{spent} {row['device']}" if row["device_hours"] is not None else spent]
        table.add_row(*(Text(text) for text in (*texts, *_more(found, row), f"{row['source']}: {row['note']}")))
    table.add_section()
    total = ", ".join(f"{_text(hours)} {kind}" for kind, hours in found["device_hours"].items())
    table.add_row(*(Text(text) for text in ("all", "", "", total, *_more(found, found), "")))
    lines = [f"Assumed: {'; '.join(found['assumed'])}."]
    if found["not_counted"]:
        lines.insert(0, f"Not in the sums, as nothing is known of it: {', '.join(found['not_counted'])}.")
    if found["without_price"]:
        lines.insert(0, f"Without a price: {', '.join(found['without_price'])} (--price KIND=AMOUNT).")
    table.caption = Text("\n".join(lines))
    return table


def _more(found: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    hours = [_text(values["hours"])] if found["devices"] is not None else []
    return [*hours, *([_text(values["cost"])] if found["prices"] else [])]


def _text(value: float | None) -> str:
    """A rate, hours or money."""
    if value is None:
        return "?"
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
