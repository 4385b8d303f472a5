"""submit: a verb as a job of a cluster, over Ray's Jobs API. The code goes along, no secret does."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from csm import storage
from csm.errors import InputError
from csm.locations import is_remote
from flows.config import Config, load_config
from flows.jobs import Jobs, follow
from flows.progress import say
from flows.tracking_address import Address, masked

PACKAGES = ("csm", "cluster", "flows")
STAYS = ("AWS_", "FSSPEC_", "HF_", "MLFLOW_TRACKING_")  # variables that a run may need: they are set where it runs, and not sent
ELSEWHERE = "the job runs on the cluster: give the whole path of a {} that every node sees"


def run_job(url: str, context: click.Context, options: Mapping[str, Any]) -> int:
    """Run the command of ``context`` with ``options`` as a job of the cluster at ``url``, follow it, and return its exit code.

    The same command joins its job while that runs. Ctrl-C leaves the job running.

    Raises:
        InputError: the settings are wrong or mean nothing on another machine, a secret would be sent, or nobody answers at ``url``.
    """
    config = load_config(options["config"], options["overrides"])
    _refuse_own_paths(config, options)
    command = words(context, options)
    line = shlex.join(command)
    if masked(line) != line:
        raise InputError(
            f"csm {masked(line)}: what is marked *** would stand in the cluster's list of jobs: leave it out and set it on the nodes, as "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or as MLFLOW_TRACKING_URI (docs/cluster.md)"
        )
    name = f"csm-{command[0]}-{storage.digest(config.to_yaml(), command)}"
    try:
        jobs = Jobs(url)
        say(f"{url} answers: asking it for job {name}")
        with tempfile.TemporaryDirectory(prefix="csm-job-") as folder:
            collect(Path(folder), options["config"])
            job, joined = jobs.start(name, f"python -m flows.cli {line}", Path(folder))
    except KeyboardInterrupt:
        say(f"interrupted before {url} said that it has job {name}: the same command asks again, and starts nothing twice")
        return 130
    say(f"job {job}: {'is there already, following it' if joined else f'submitted to {url}'}")
    own = sorted(variable for variable in os.environ if variable.startswith(STAYS) and variable != "MLFLOW_TRACKING_URI")
    if own and not joined:
        say(f"not sent along: {', '.join(own)}; what the run needs of these must be set on the nodes (docs/cluster.md)")
    try:
        return follow(jobs, job, options["as_json"])
    except KeyboardInterrupt:
        say(f"job {job} goes on: the same command follows it again, `ray job stop --address {url} {job}` stops it")
        return 130


def words(context: click.Context, options: Mapping[str, Any]) -> list[str]:
    """The verb and what was given to it, as the job's command line has it."""
    given = {**options, "config": _sent_config(options["config"])}
    given["address"] = "auto" if options["address"] == "local" else options["address"]
    named, arguments = [str(context.info_name)], []
    for parameter in context.command.params:
        value = given.get(str(parameter.name))
        if value is None or value is False or value in ("", ()):
            continue
        if isinstance(parameter, click.Argument):
            arguments.append(str(value))
        elif value is True:
            named.append(parameter.opts[0])
        else:
            named += [f"{parameter.opts[0]}={each}" for each in (value if isinstance(value, tuple) else (value,))]
    return [*named, *(["--", *arguments] if arguments else [])]


def collect(folder: Path, config: str) -> None:
    """Put into ``folder`` what the job needs of this machine: the sources, and the configuration if it is a file."""
    for package in PACKAGES:
        shutil.copytree(Path(__file__).parents[1] / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    if (sent := _sent_config(config)) != config:
        (folder / sent).parent.mkdir()
        shutil.copy(config, folder / sent)


def _sent_config(config: str) -> str:
    """Where the job finds ``config``: a file keeps its name, which is the name of the configuration."""
    return f"config/{Path(config).name}" if config.endswith((".yaml", ".yml")) else config


def _refuse_own_paths(config: Config, options: Mapping[str, Any]) -> None:
    """``InputError`` for a path that means another place where the job runs."""
    workspace, tracking = options["workspace"], Address(options["tracking_uri"], options["experiment"])
    if not is_remote(workspace) and not workspace.is_absolute():
        raise InputError(f"--workspace {workspace}: {ELSEWHERE.format('folder')}, or s3://BUCKET/FOLDER")
    if tracking.is_sqlite and not tracking.uri.partition("://")[2].startswith("//"):
        raise InputError(f"--tracking-uri {tracking}: {ELSEWHERE.format('file')}, as in sqlite:////shared/mlflow.db, or a server")
    for name, value in [("PATH", options.get("path") or ""), *_paths(asdict(config))]:
        if not os.path.isabs(value) and os.path.exists(value):
            raise InputError(f"{name}: {value} lies on this machine; {ELSEWHERE.format('file or folder')}")


def _paths(settings: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that is called path, with its dotted key."""
    for name, value in settings.items():
        dotted = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping):
            yield from _paths(value, dotted)
        elif name == "path" and value:
            yield dotted, str(value)
