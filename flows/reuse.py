"""Stages brought up to date: when a result is reused, and what is refused so that nothing is lost."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from csm import storage, tables
from csm.errors import InputError
from flows.artifacts import StageRecord, differences
from flows.config import plain
from flows.progress import say
from flows.stages import Context, Stage


def run_stages(context: Context, names: Sequence[str]) -> None:
    """Bring the stages ``names`` up to date, one after the other: see ``run_stage``."""
    for name in names:
        context.stages[name].check_early(context)
    for name in names:
        if name == "fit-teacher" and not any(name in context.stages[other].reads(context.resolved) for other in names):
            continue  # plan.pairs: auto came to all pairs, for which nobody is asked
        run_stage(context, name)
        if not context.outcomes[name]["reused"]:  # now something in the workspace is of this configuration
            storage.write_text(context.workspace.config, context.resolved.to_yaml())
        if name == "prepare":  # what the others need of the user can be checked against the data, before hours of work
            for later in names:
                context.stages[later].check(context)


def run_stage(context: Context, name: str) -> None:
    """Bring stage ``name`` up to date: reuse what it made, go on with what was interrupted, or do it.

    Raises:
        InputError: an input stage was not run or is out of date, or costly results of other settings would be replaced.
    """
    stage, workspace = context.stages[name], context.workspace
    require(context, name, stage.reads(context.resolved))
    forced = name in context.forced
    record, wanted = workspace.record(name), _wanted(context, stage)
    if not forced and stale(context, name) is None and record is not None:
        context.outcomes[name] = {"seconds": 0.0, "reused": True, "rows": record.rows}
        say(f"{name}: reused ({record.rows:,} {stage.unit})")
        return
    outputs = stage.outputs(workspace, context.config)
    stage.check(context)
    if record is not None and (forced or record.fingerprint != wanted.fingerprint):
        keeps = not forced and (stage.incremental or (stage.keeps is not None and stage.keeps(context, wanted)))
        if stage.costly and not forced and not keeps and any(_holds(path) for path in outputs):
            raise _replaces(context, name, _changes(record, wanted))
        context.whole -= {looked_at for looked_at in context.whole if looked_at[1] == name}
        if not keeps:
            workspace.drop(name, outputs)
        record = None
    spent = record.seconds if record else 0.0
    workspace.write_record(replace(wanted, seconds=spent))
    say(f"{name}: {'going on' if record else 'started'}")
    tags = {"csm.kind": "stage", "csm.stage": name, "csm.fingerprint": wanted.fingerprint}
    params = {**wanted.settings, "input": wanted.inputs, "code_version": wanted.code_version}
    key = context.child(f"stage {name} {wanted.fingerprint}", name, tags, params)
    started = time.monotonic()
    try:
        made = stage.run(context, wanted)
    except BaseException as error:
        workspace.write_record(replace(wanted, seconds=round(spent + time.monotonic() - started, 3)))
        context.tracker.close_run(key, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    seconds = round(time.monotonic() - started, 3)
    lost = context.losses.get(name)
    lost_values = {"workers_lost": lost.workers, "seconds_lost": round(lost.seconds, 3)} if lost else {}
    context.tracker.log_metrics(key, {"seconds": spent + seconds, "rows": float(made.rows), **lost_values})
    context.tracker.close_run(key)
    if name == "prepare":
        context.name_data()
    workspace.write_record(replace(wanted, done=True, digest=made.digest, rows=made.rows, seconds=round(spent + seconds, 3)))
    context.outcomes[name] = {"seconds": seconds, "reused": False, "rows": made.rows, **lost_values}
    if lost and lost.workers:
        say(f"{name}: {lost}")
    say(f"{name}: done, {made.rows:,} {stage.unit} in {seconds:.1f} s")


def require(context: Context, name: str, needs: Sequence[str]) -> None:
    """``InputError`` if the result of one of the stages ``needs`` is not what the configuration asks for; ``name`` is who needs it."""
    for needed in needs:
        reason = stale(context, needed)
        if reason:
            raise InputError(
                f"{name} needs {needed}, which {reason}: run `csm {_verb(context, needed)}` with the same options first, or `csm run`"
            )


def stale(context: Context, name: str) -> str | None:
    """Why the result of stage ``name`` is not what the configuration asks for, or None if it is."""
    stage, record = context.stages[name], context.workspace.record(name)
    if record is None:
        return "was not run in this workspace"
    for needed in stage.reads(context.resolved):
        reason = stale(context, needed)
        if reason:
            return f"depends on {needed}, which {reason}"
    wanted = _wanted(context, stage)
    if record.fingerprint != wanted.fingerprint:
        return f"was run with other settings ({_changes(record, wanted)})"
    if not record.done:
        return "was interrupted"
    looked_at = (str(context.workspace.root), name, record.fingerprint)
    if looked_at in context.whole:
        return None
    if stage.missing:
        missing = stage.missing(context, record)
    else:
        missing = next((path for path in stage.outputs(context.workspace, context.config) if not _is_whole(path)), None)
    if missing is None:
        changed = stage.changed(context)
        if changed is None:
            context.whole.add(looked_at)
        return changed
    return f"{'has a damaged' if missing.exists() else 'lacks'} {missing}"


def refuse_replacing(context: Context, names: Sequence[str]) -> None:
    """Refuse, before anything is written, the stages of which ``run_stage`` would refuse to replace costly results.

    What a stage will be made from is not known yet, but its settings and those of the stages before it are.
    """
    for name in names:
        stage, record = context.stages[name], context.workspace.record(name)
        if not stage.costly or name in context.forced or record is None:
            continue
        changed = [change for source in _sources(context, name) for change in _own_changes(context, source)]
        if changed and any(_holds(path) for path in stage.outputs(context.workspace, context.config)):
            raise _replaces(context, name, _some(changed))


def _sources(context: Context, name: str) -> list[str]:
    """``name`` and the stages that its result comes from, each once; not one that was run again since, with another result."""
    record, records = context.workspace.record(name), context.workspace.record
    used = [
        needed
        for needed in context.stages[name].reads(context.resolved)
        if (made := records(needed)) and record and record.inputs.get(needed) in (made.digest, None)
    ]
    return list(dict.fromkeys([*(source for needed in used for source in _sources(context, needed)), name]))


def _own_changes(context: Context, name: str) -> list[str]:
    """What has changed in the settings and the code of stage ``name`` since it was run; nothing if it was not."""
    record, wanted = context.workspace.record(name), _wanted(context, context.stages[name])
    if record is None:
        return []
    changed = (
        [] if context.stages[name].grows(record.settings, wanted.settings) else differences(record.settings, wanted.settings)
    )
    return changed if record.code_version == wanted.code_version else [*changed, f"a newer {name}"]


def _replaces(context: Context, name: str, changed: str) -> InputError:
    return InputError(
        f"--workspace {context.workspace.root}: {name} was made by another configuration there ({changed}); "
        f"set that back (--set), choose another --workspace, or replace it with --force {name}"
    )


def _is_whole(path: Path) -> bool:
    """Whether ``path`` exists and, if it is a table, was not cut short."""
    return path.exists() if path.suffix != ".parquet" else tables.metadata(path) is not None


def _holds(path: Path) -> bool:
    """Whether ``path`` is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _wanted(context: Context, stage: Stage) -> StageRecord:
    """The record that ``stage`` should have, before it is run."""
    settings = plain(stage.settings(context.resolved))
    inputs = {name: record.digest if (record := context.workspace.record(name)) else "" for name in stage.reads(context.resolved)}
    inputs |= {path.name: storage.file_digest(path) for path in stage.also_reads(context.workspace) if path.is_file()}
    fingerprint = storage.digest(stage.name, stage.code_version, settings, inputs)
    return StageRecord(stage.name, fingerprint, settings, stage.code_version, inputs)


def _changes(record: StageRecord, wanted: StageRecord) -> str:
    changed = differences(record.settings, wanted.settings)
    changed += [f"another result of {name}" for name, digest in wanted.inputs.items() if record.inputs.get(name) != digest]
    if record.code_version != wanted.code_version:
        changed.append("a newer version of csm")
    return _some(changed)


def _some(changed: list[str]) -> str:
    return "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")


def _verb(context: Context, stage: str) -> str:
    """The verb that runs ``stage``."""
    if stage == "generator":
        return "import-generator" if context.config.generator.path else "fit-generator"
    if stage in ("model", "evaluate-shift"):
        return "train" if stage == "model" else "evaluate"
    return "annotate" if stage in ("fit-teacher", "fit-annotators") else stage
