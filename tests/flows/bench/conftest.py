"""Trainings in this process, one after the other, for tests that are about what a benchmark does with them."""

from collections.abc import Iterator

import pytest

from cluster.training import RunEvent, TrainingError
from csm.runs import fit_run, is_finished
from flows import training
from flows.stages import Context


@pytest.fixture(scope="module")
def serial() -> Iterator[list[str]]:
    """No Ray; gives the runs that were trained. One whose loss is not finite fails as it does there."""
    trained: list[str] = []

    def fit_many(specs, group, directory, name, on_event, together=1) -> None:  # type: ignore[no-untyped-def]
        errors = {}
        for spec in specs:
            if not is_finished(spec):
                trained.append(spec.run)
                try:
                    fit_run(spec)
                except FloatingPointError as error:
                    errors[spec.run] = f"FloatingPointError: {error}"
                on_event(RunEvent(spec.run, "failed" if spec.run in errors else "done", 0, {}, errors.get(spec.run, "")))
        if errors:
            raise TrainingError(errors, len(specs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "connect", lambda self: None)
        patch.setattr(training, "fit_many", fit_many)
        yield trained
