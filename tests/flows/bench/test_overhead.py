import json

import pytest


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_says_what_ray_costs_in_time_and_memory(csm):
    done = csm("bench", "overhead", "--seconds", "1", "--shards", "30", "--json", timeout=580)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"rows", "bare_s", "ray_s", "ratio", "connect_s", "load_before", "cpus"} <= set(result)
    assert result["identical"] is True
    assert result["rows"] % 360 == 0
    assert result["ratio"] == pytest.approx(result["ray_s"] / result["bare_s"], rel=0.05)
    assert result["shards"] == 30
    assert result["driver_growth_mib"] == result["driver_peak_mib_10x"] - result["driver_peak_mib"]
    assert 100 < result["driver_peak_mib"] < result["driver_peak_mib_10x"] + 50
    assert result["driver_growth_mib"] < 200
