"""prepare: source -> `real` table and dataset.json."""

import json
from functools import lru_cache
from pathlib import Path

from csm.datasets import RealDataset, load_dataset, source_digest
from csm.errors import InputError
from flows.artifacts import StageRecord, Workspace
from flows.config import Config
from flows.progress import say
from flows.stages import Context, Made, Stage


def _run(context: Context, record: StageRecord) -> Made:
    dataset = _dataset(context.config)
    dataset.save(context.workspace.root)
    info = dataset.info
    counts = ", ".join(f"{count:,} {split}" for split, count in info.counts.items())
    say(f"  {info.name}: {info.n_classes} classes, {'x'.join(map(str, info.shape))} pixels; {counts}")
    return Made(len(dataset.frame), info.digest)


def _dataset(config: Config) -> RealDataset:
    return _load(json.dumps(config.data))


@lru_cache(maxsize=1)
def _load(data: str) -> RealDataset:
    """Read the source once for the check and for the work."""
    try:
        return load_dataset(**json.loads(data))
    except InputError:
        raise
    except ValueError as error:  # a value that the source does not take
        raise InputError(f"data: {error}") from None


def _outputs(workspace: Workspace, config: Config) -> list[Path]:
    truth = [workspace.truth] if config.data["source"] == "gaussians" else []
    return [workspace.dataset, workspace.root / "real", *truth]


STAGE = Stage(
    name="prepare",
    code_version=1,
    inputs=(),
    settings=lambda config: {"data": config.data, "files": source_digest(**config.data)},
    outputs=_outputs,
    check=lambda context: _dataset(context.config),
    run=_run,
    costly=True,
)


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
