"""The cluster launcher's files, held against Ray's own checks, a shell, and an EC2 that is pretended."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs, with_head_node_ip
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).parents[2]
LAUNCHERS = ["ray_cluster.yaml", "cluster/aws.yaml"]


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_file(name):
    validate_config(prepare_config(launcher(name)))
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        validate_config(prepare_config(launcher(name) | {"setup_comands": []}))


def test_every_address_is_a_worker():
    cluster = launcher("ray_cluster.yaml")
    cluster["provider"]["worker_ips"] = [f"10.0.0.{host}" for host in range(2, 9)]
    prepared = prepare_config(cluster)
    (node_type,) = prepared["available_node_types"].values()
    assert (node_type["min_workers"], node_type["max_workers"], prepared["max_workers"]) == (7, 7, 7)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_hosts_get_the_project_and_the_token(name):
    mounts = launcher(name)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"  # a file of the user's, never the token itself
    assert all((ROOT / here).exists() for here in mounts.values())
    # setuptools needs these to install the project; a folder is named after what it holds.
    names = {Path(there).name for there in mounts}
    assert names == {"csm", "cluster", "flows", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all(Path(there).parent == Path("~/csm-code") and Path(there).name == here for there, here in mounts.items())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_commands_are_shell(name):
    cluster = launcher(name)
    lists = [key for key in cluster if key.endswith("_commands")]
    assert len(lists) >= 3
    for command in (command for key in lists for command in cluster[key]):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=10)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_shells_find_the_environment_and_the_secrets(name, tmp_path):
    (command,) = [command for command in launcher(name)["setup_commands"] if ".bashrc" in command]
    (tmp_path / ".csm_env").write_text("export HF_TOKEN=secret\n")
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for _ in range(2):  # `ray up` again
        subprocess.run(["bash", "-c", command], env=env, check=True, timeout=10)
    assert (tmp_path / ".bashrc").read_text().count("csm-venv") == 1
    shown = 'source ~/.bashrc; echo "$PATH $RAY_AUTH_MODE $HF_TOKEN"'
    said = subprocess.run(["bash", "-c", shown], env=env, check=True, timeout=10, capture_output=True, text=True).stdout
    assert said == f"{tmp_path}/csm-venv/bin:/usr/bin:/bin token secret\n"


def started(name: str, role: str, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What `ray start` is given as environment and as options, when a host runs its start commands as the launcher sends them."""
    cluster = launcher(name)
    (folder / "ray_bootstrap_config.yaml").write_text(json.dumps(cluster))
    ray = folder / "ray"
    ray.write_text('#!/bin/sh\n[ "$1" != start ] || { env -0 > "$HOME/env"; shift; printf "%s\\n" "$@" > "$HOME/options"; }\n')
    ray.chmod(0o755)
    commands = cluster[f"{role}_start_ray_commands"]
    if role == "head":
        commands = with_envs(commands, {"RAY_enable_autoscaler_v2": "1"})
    else:
        commands = with_head_node_ip(commands, "10.0.0.1")
    for command in commands:
        env = {"HOME": str(folder), "PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin"}
        subprocess.run(["bash", "-c", command], env=env, check=True, timeout=20)
    variables = dict(item.split("=", 1) for item in (folder / "env").read_text().split("\0") if item)
    options = ray_start.make_context("ray start", (folder / "options").read_text().splitlines()).params
    return variables, options


def test_the_head_keeps_to_its_private_address(tmp_path):
    variables, options = started("ray_cluster.yaml", "head", tmp_path)
    assert options["head"]
    assert options["node_ip_address"] == options["dashboard_host"] == "10.0.0.1"
    assert options["num_cpus"] == options["num_gpus"] == 0
    assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert variables["RAY_enable_autoscaler_v2"] == "0"  # the newer one leaves a worker of one's own machines out


@pytest.mark.parametrize("name", LAUNCHERS)
def test_heads_ask_for_the_token_and_give_dead_hosts_up_in_ten_seconds(name, tmp_path):
    variables, options = started(name, "head", tmp_path)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert options["dashboard_host"] not in ("", "0.0.0.0", "::")
    assert gives_up_after(variables) < 10


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_join_with_the_token_and_all_that_they_have(name, tmp_path):
    variables, options = started(name, "worker", tmp_path)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert options["address"] == "10.0.0.1:6379"
    assert options["num_cpus"] is options["num_gpus"] is None


def gives_up_after(variables: dict[str, str]) -> float:
    """Seconds until a host that stopped to answer counts as dead, at most."""
    period, timeout, failures = (
        float(variables[f"RAY_health_check_{key}"]) for key in ("period_ms", "timeout_ms", "failure_threshold")
    )
    return (period + timeout) * failures / 1000


@pytest.mark.slow
def test_a_cloud_makes_these_machines(tmp_path, monkeypatch):
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes its key to ~/.ssh
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # and a cache to the temporary folder
    cluster = launcher("cluster/aws.yaml")
    region = cluster["provider"]["region"]
    with mock_aws():
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for node in cluster["available_node_types"].values():
            node["node_config"]["ImageId"] = image
        for profile in ("csm-head", "csm-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        config = _bootstrap_config(cluster, no_config_cache=True)
        provider = _get_node_provider(config["provider"], config["cluster_name"])
        for name, node in config["available_node_types"].items():
            tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-user-node-type": name, "ray-node-name": name}
            provider.create_node(copy.deepcopy(node["node_config"]), tags, 1)
        machines = [machine for made in ec2.describe_instances()["Reservations"] for machine in made["Instances"]]
        groups = ec2.describe_security_groups()["SecurityGroups"]
    resources = {name: node["resources"] for name, node in config["available_node_types"].items()}
    assert resources["head"] == {"CPU": 0}
    assert (resources["gpu"]["GPU"], resources["gpu"]["CPU"]) == (1, 8)
    assert "GPU" not in resources["cpu"]
    made = {tag["Value"]: machine for machine in machines for tag in machine["Tags"] if tag["Key"] == "ray-user-node-type"}
    assert {name: machine.get("InstanceLifecycle") for name, machine in made.items()} == {
        "head": None,
        "gpu": "spot",
        "cpu": "spot",
    }
    assert {name: machine["IamInstanceProfile"]["Arn"].split("/")[-1] for name, machine in made.items()} == {
        "head": "csm-head",
        "gpu": "csm-worker",
        "cpu": "csm-worker",
    }
    world = [rule for group in groups for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in world] == [(22, 22)]  # ssh; docs/cluster.md says how to close that too
