"""`csm plan --estimate`: its options, and how the result is shown."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from csm.errors import InputError
from flows.options import print_table


def run_estimate(
    rates: Sequence[str],
    prices: Sequence[str],
    devices: int | None,
    seconds: float,
    config: str,
    overrides: tuple[str, ...],
    workspace: Path,
    address: str,
    as_json: bool,
    **_: Any,
) -> None:
    """Print the estimate; of the options that all verbs share, those that have to do with doing the work say nothing here."""
    started = time.monotonic()
    from flows.config import load_config
    from flows.masking import command_line

    command_line(address)
    resolved = load_config(config, overrides)
    from flows.estimate import KINDS, estimate, estimate_table

    found_prices = amounts("--price", prices)
    for kind in found_prices:
        if kind not in KINDS:
            raise InputError(f"--price {kind}: expected one of {', '.join(KINDS)}")
    found = estimate(resolved, workspace, address, amounts("--rate", rates), found_prices, devices, seconds)
    print_table(estimate_table(found), width=130)
    if as_json:
        click.echo(json.dumps({**found, "seconds": round(time.monotonic() - started, 3)}))


def amounts(option: str, given: Sequence[str]) -> dict[str, float]:
    """NAME -> number of each NAME=NUMBER; ``InputError`` if one is no positive number."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not name or not 0 < found[name] < math.inf:
            raise InputError(f"{option} {text}: expected NAME=NUMBER, a number above 0")
    return found
