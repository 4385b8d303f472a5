import json

import pytest


@pytest.mark.slow
def test_trials_through_tune_give_what_bare_processes_give(csm):
    done = csm("bench", "tune", "--trials", "3", "--seconds", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["trials"], result["parallel"], result["identical"]) == (3, 2, True)
    assert result["ratio"] == pytest.approx(result["tune_s"] / result["bare_s"], abs=0.1)
