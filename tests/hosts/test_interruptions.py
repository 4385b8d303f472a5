"""What does not end the work, or ends it such that the same command goes on: head, driver, network, disk and tracking server fail."""

import json
import time

import pytest

from tests.hosts.machines import CODE, CTL
from tests.hosts.small_run import SmallRun, result

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole(launched):
    """The small pipeline, run to its end while nothing fails."""
    run = SmallRun(launched, launched.hosts.shared / "whole")
    run.finish("run")
    run.check()
    return run


@pytest.fixture
def run(whole, cluster, workspace):
    """The same, before anything is mixed."""
    return whole.copy_unmixed(workspace)


def usual_seconds(whole):
    """What mixing takes while nothing fails."""
    return json.loads((whole.workspace / "stages" / "mix.json").read_text())["seconds"]


def seconds_since(started):
    return time.monotonic() - started


def test_the_head_is_killed_and_brought_back(run, whole, cluster, hosts, tell):
    submit = f"cd {CODE} && ray submit {cluster.file} flows/run.py -- {run.options()}"
    first = hosts.begin(CTL, submit)
    run.wait_for_mixed(5, first)
    killed = time.monotonic()
    hosts.kill(cluster.head)
    assert first.wait(60)  # whoever waits for it hears that it has failed
    hosts.start(cluster.head)
    cluster.up()
    back = seconds_since(killed)
    kept = run.parts()
    assert 5 <= len(kept) < 40
    second = hosts.begin(CTL, submit)
    known = len(run.mixed())
    run.wait_for_mixed(known + 1, second)
    lost = seconds_since(killed)
    assert second.wait(600) == 0, second.err.read_text()[-4000:]
    assert list(result(second.out.read_text())["stages"])[-1] == "report"
    assert {name: run.parts()[name] for name in kept} == kept  # not made again
    run.check(whole.workspace)
    tell(
        "the head killed and brought back",
        f"the run ended; after `ray up` the same command kept {len(kept)} of 40 shards and made the rest",
        lost,
        f"from the loss to the next finished shard; `ray up` and all workers joined after {back:.0f} s of it",
    )


def test_the_driver_is_killed(run, whole, cluster, hosts, tell):
    first = run.begin("mix")
    run.wait_for_mixed(5, first)
    killed = time.monotonic()
    first.kill()
    kept, known = run.parts(), len(run.mixed())
    second = run.begin("mix")
    run.wait_for_mixed(known + 1, second)
    lost = seconds_since(killed)
    assert second.wait(600) == 0, second.err.read_text()[-4000:]
    assert {name: run.parts()[name] for name in kept} == kept
    run.check(whole.workspace)
    happened = f"the same command kept {len(kept)} of 40 shards and made the rest"
    tell("the driver killed", happened, lost, "from the kill to the next finished shard, the start of the command included")


def test_the_network_of_a_worker_is_cut_for_20_s(run, whole, cluster, hosts, tell):
    running, name = run.begin("mix"), cluster.workers[0]
    run.wait_for_mixed(5, running)
    hosts.cut(name)
    time.sleep(20)
    hosts.mend(name)
    mended = time.monotonic()
    assert running.wait(600) == 0, running.err.read_text()[-4000:]
    run.check(whole.workspace)
    took = result(running.out.read_text())["stages"]["mix"]["seconds"]
    cluster.wait_for(len(hosts.names), 180)  # it joins again by itself
    tell(
        "the network cut between head and worker for 20 s",
        f"the worker was given up, its shards made by the other one; it had joined again {seconds_since(mended):.0f} s after the cut",
        took - usual_seconds(whole),
        f"mixing of 40 shards took {took:.0f} s instead of {usual_seconds(whole):.0f} s",
    )


def test_the_disk_of_a_worker_is_full(run, whole, cluster, hosts, tell):
    running, name = run.begin("mix"), cluster.workers[0]
    run.wait_for_mixed(5, running)
    hosts.fill(name)
    code = running.wait(600)
    lines = running.err.read_text()
    if code:  # it may stop, with one line, and goes on when there is space
        assert lines.splitlines()[-1].startswith("csm: ")
        hosts.free(name)
        run.finish("mix")
    run.check(whole.workspace)
    hosts.free(name)
    took = result(running.out.read_text())["stages"]["mix"]["seconds"] if code == 0 else usual_seconds(whole)
    tell(
        "a worker's disk full", "nothing: what is made goes to storage", took - usual_seconds(whole), f"mixing took {took:.0f} s"
    )


def test_the_tracking_server_is_down(run, whole, cluster, hosts, tell):
    server = "mlflow server --host 10.77.0.254 --port 5000 --workers 1 --backend-store-uri sqlite:////tmp/mlflow.db"
    serving = hosts.begin(CTL, server)
    tracked = "--tracking-uri http://10.77.0.254:5000"
    wait_for_server(hosts, serving)
    running = run.begin("mix", tracked)
    run.wait_for_mixed(5, running)
    serving.kill()
    assert running.wait(600) == 0, running.err.read_text()[-4000:]
    took = result(running.out.read_text())["stages"]["mix"]["seconds"]
    run.check(whole.workspace)
    assert (run.workspace / "tracking.jsonl").stat().st_size  # what could not be sent waits
    serving = hosts.begin(CTL, server)
    wait_for_server(hosts, serving)
    again = run.finish("mix", tracked)
    assert again["stages"]["mix"]["reused"]
    images = (
        "from mlflow import MlflowClient as C; c = C(); runs = c.search_runs([e.experiment_id for e in c.search_experiments()]);"
    )
    images += "print(max(run.data.metrics.get('images', 0) for run in runs))"
    assert hosts.run(CTL, f'MLFLOW_TRACKING_URI=http://10.77.0.254:5000 python -c "{images}"').stdout == "240.0\n"
    serving.kill()
    tell(
        "the tracking server down",
        "mixing went on; the records waited in the workspace and were sent by the next command",
        took - usual_seconds(whole),
        f"mixing of 40 shards took {took:.0f} s instead of {usual_seconds(whole):.0f} s",
    )


def wait_for_server(hosts, serving):
    end = time.monotonic() + 120
    while hosts.run(CTL, "timeout 2 bash -c '</dev/tcp/10.77.0.254/5000'", check=False).returncode:
        assert serving.returncode is None, serving.err.read_text()[-4000:]
        assert time.monotonic() < end
        time.sleep(0.5)
