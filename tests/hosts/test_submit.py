"""The demo's pipeline, made small, by `ray submit` and by `ray job submit`, on hosts brought up from ray_cluster.yaml."""

import json
import shlex

import pytest

from tests.flows.outcomes import STAGES
from tests.hosts.machines import CODE, CTL
from tests.hosts.small_run import hosts_of, read_receipts, result

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900, func_only=True)]
DEMO = {
    "generator.steps": "5",
    "generator.block_channels": "[8,16]",
    "plan.pairs": "[[0,1],[2,3]]",
    "plan.ratios": "3",
    "plan.sets_per_pair": "40",
    "plan.shard_rows": "6",
    # Labelling takes longer than mixing, so one worker cannot do it all.
    "mix.sampler.steps": "3",
    "annotate.annotator": "teacher",
    "annotate.members": "8",
    "annotate.encoders.teacher.parameters.views": "9",
    "train.seeds": "1",
    "train.compare": "[cross-entropy,csm]",
    "train.optimizer.epochs": "2",
    # One mixing and one annotation worker on each of the two hosts.
    "resources.mix.cpus": "1.5",
    "resources.annotate.cpus": "0.4",
    "resources.annotate.min_actors": "2",
    "resources.annotate.max_actors": "2",
}
SETTINGS = [word for key, value in DEMO.items() for word in ("--set", f"{key}={value}")]


def run_on(workspace):
    return shlex.join(["--config", "demo", "--address", "auto", "--workspace", str(workspace), "--json", *SETTINGS])


def check(cluster, workspace, stdout):
    printed = result(stdout)
    assert list(printed["stages"]) == STAGES
    assert (workspace / "report.html").stat().st_size > 10_000
    for part in ("mixed", "teacher"):
        made = [receipt for receipt in read_receipts(workspace) if receipt["part"] == part]
        assert sorted(receipt["shard"] for receipt in made) == list(range(40))
        assert set(hosts_of(cluster, made)) == set(cluster.workers)


def test_ray_submit_runs_the_demo_to_its_end_on_both_workers(cluster, hosts, workspace):
    done = hosts.run(CTL, f"cd {CODE} && ray submit {cluster.file} flows/run.py -- {run_on(workspace)}", 600)
    check(cluster, workspace, done.stdout)


def test_ray_job_submit_runs_the_demo_to_its_end_on_both_workers_and_csm_submits_the_same_again(cluster, hosts, workspace):
    job = f"ray job submit --address {cluster.jobs} -- csm run {run_on(workspace)}"
    done = hosts.run(CTL, f"export RAY_AUTH_MODE=token && {job}", 600)
    check(cluster, workspace, done.stdout)
    submitted = f"csm run --submit {cluster.jobs} {run_on(workspace)}"
    again = hosts.run(CTL, f"export RAY_AUTH_MODE=token && {submitted}", 600)
    assert all(stage["reused"] for stage in result(again.stdout)["stages"].values())


def test_doctor_finds_nothing_wrong_with_it(cluster, hosts, workspace):
    workspace.mkdir()
    done = hosts.run(cluster.head, f"csm doctor --address auto --workspace {workspace} --json")
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["problems"] == []
    assert printed["ray"]["nodes"] == len(hosts.names)


def test_without_the_token_nobody_submits(cluster, hosts):
    job = f"ray job submit --address {cluster.jobs} -- echo run-by-a-stranger"
    done = hosts.run(CTL, f"mv ~/.ray/auth_token ~/kept; {job}; code=$?; mv ~/kept ~/.ray/auth_token; exit $code", check=False)
    assert done.returncode
    assert "run-by-a-stranger\n" not in done.stdout
