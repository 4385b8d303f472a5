"""What does not end the work, or ends it such that the same command goes on: head, driver, network, disk and tracking server fail."""

import time

import pytest

from tests.hosts.machines import CODE, CTL, GATEWAY, STORE_PORT
from tests.hosts.small_run import SmallRun, result, usual_seconds, wait_for

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900, func_only=True)]


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
    run.finish("annotate")  # of shards that were mixed and not yet annotated when the driver died
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
    server = f"mlflow server --host {GATEWAY} --port 5000 --workers 1 --backend-store-uri sqlite:////tmp/mlflow.db"
    serving = hosts.begin(CTL, server)
    tracked = f"--tracking-uri http://{GATEWAY}:5000"
    hosts.wait_for_port(CTL, 5000, serving)
    running = run.begin("mix", tracked)
    run.wait_for_mixed(5, running)
    serving.kill()
    assert running.wait(600) == 0, running.err.read_text()[-4000:]
    took = result(running.out.read_text())["stages"]["mix"]["seconds"]
    run.check(whole.workspace)
    assert any(path.stat().st_size for path in run.workspace.glob("tracking-*.jsonl"))  # what could not be sent waits
    serving = hosts.begin(CTL, server)
    hosts.wait_for_port(CTL, 5000, serving)
    again = run.finish("mix", tracked)
    assert again["stages"]["mix"]["reused"]
    images = (
        "from mlflow import MlflowClient as C; c = C(); runs = c.search_runs([e.experiment_id for e in c.search_experiments()]);"
    )
    images += "print(max(run.data.metrics.get('images', 0) for run in runs))"
    assert hosts.run(CTL, f'MLFLOW_TRACKING_URI=http://{GATEWAY}:5000 python -c "{images}"').stdout == "240.0\n"
    serving.kill()
    tell(
        "the tracking server down",
        "mixing went on; the records waited in the workspace and were sent by the next command",
        took - usual_seconds(whole),
        f"mixing of 40 shards took {took:.0f} s instead of {usual_seconds(whole):.0f} s",
    )


def test_storage_answers_errors_for_a_minute(whole, cluster, hosts, workspace, tell):
    folder = hosts.shared / "store"
    folder.mkdir()
    serving = hosts.begin(CTL, f"cd {CODE} && python -m tests.hosts.store {GATEWAY} {STORE_PORT} csm {folder}")
    hosts.wait_for_port(CTL, STORE_PORT, serving)
    run = SmallRun(cluster, workspace)
    place = ("--workspace s3://csm/w", f"--tracking-uri sqlite:///{hosts.shared}/store.db")
    running = run.begin("run", *place)
    wait_for(lambda: len(parts_written(folder)) >= 5, running)
    (folder / "failing").touch()
    failing = time.time()
    time.sleep(60)
    (folder / "failing").unlink()
    code = running.wait(600)
    if code:  # it may give up, with one line, and goes on when it is told to
        assert running.err.read_text().splitlines()[-1].startswith("csm: ")
        running = run.begin("run", *place)
        assert running.wait(600) == 0, running.err.read_text()[-4000:]
    copy = f"import fsspec; fsspec.filesystem('s3').get('csm/w/', '{workspace}/', recursive=True)"
    hosts.run(CTL, f'python -c "{copy}"')
    serving.kill()
    run.check(whole.workspace)
    times, back = parts_written(folder), failing + 60
    tell(
        "storage answering errors for a minute",
        "the command stopped with one line; the same command went on" if code else "the work waited and went on",
        min(when for when in times if when > back) - max(when for when in times if when <= back),
        "from the last finished shard before the storage was back to the next one",
    )


def parts_written(folder):
    """When each mixed part was put into the store, seconds since 1970."""
    lines = (folder / "written").read_text().splitlines()
    return [float(line.split()[0]) for line in lines if "/mixed/part-" in line]
