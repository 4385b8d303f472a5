"""Kubernetes manifests and the image, held against KubeRay's schema and against what the rest of the project says."""

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flows.cli import cli as csm

ROOT = Path(__file__).parents[2]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line)


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster/kuberay" / f"{name}.yaml").read_text(encoding="utf-8"))


def crd() -> dict[str, Any]:
    """Schema of a RayJob; keys that it does not know are errors, as `kubectl apply` has them."""
    packed = (ROOT / "tests/data/kuberay-1.7.0-rayjob.schema.json.gz").read_bytes()

    def strict(schema: Any) -> Any:
        if isinstance(schema, list):
            return [strict(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        closed = {key: strict(value) for key, value in schema.items()}
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
            closed.setdefault("additionalProperties", False)
        return closed

    return strict(json.loads(gzip.decompress(packed)))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def test_kubernetes_accepts_the_manifests():
    schema = crd()
    validator = jsonschema.Draft202012Validator
    job, cluster = manifest("rayjob"), manifest("raycluster")
    validator(schema).validate(job)
    validator(schema["properties"]["spec"]["properties"]["rayClusterSpec"]).validate(cluster["spec"])
    assert {(part["apiVersion"], part["kind"]) for part in (job, cluster)} == {
        ("ray.io/v1", "RayJob"),
        ("ray.io/v1", "RayCluster"),
    }
    assert all(set(part) == {"apiVersion", "kind", "metadata", "spec"} for part in (job, cluster))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shutdownAfterJobFinish",), True),
        (("rayClusterSpec", "authOptions", "mode"), "on"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "container"), []),
        (
            ("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "32 GB",
        ),
    ],
)
def test_the_schema_refuses_slips(path, value):
    job = manifest("rayjob")
    place = job["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(crd()).validate(job)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_pods_have_the_token_the_volume_and_quick_health_checks(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}  # of KubeRay's making: none is written here
    assert spec["rayVersion"] == PINS["ray"]
    claim = manifest("volume")["metadata"]["name"]
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    for group in (head, *workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["restartPolicy"] == "Never"  # as KubeRay demands of autoscaler v2
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    variables = {item["name"]: item["value"] for item in head["template"]["spec"]["containers"][0]["env"]}
    on_own_machines = (ROOT / "ray_cluster.yaml").read_text(encoding="utf-8")
    assert variables == dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", on_own_machines))
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)


def test_the_job_is_a_command_of_csm():
    spec = manifest("rayjob")["spec"]
    program, verb, *arguments = shlex.split(spec["entrypoint"])
    assert program == "csm"
    command = csm.commands[verb]
    options = command.make_context(verb, arguments).params
    assert options["address"] == "auto"
    assert str(options["workspace"]).startswith("/shared/")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] == "K8sJobMode"  # whose submitter asks whether the job is there before it submits


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_takes_what_is_there_and_nothing_else():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {part for name, rest in dockerfile() if name == "COPY" for part in rest.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / part).exists() for part in copied)
    assert "." not in copied


def test_the_image_is_a_user_of_kubernetes_with_the_pinned_python():
    steps = dockerfile()
    assert steps[0][0] == "FROM"
    assert steps[0][1].startswith("python:3.11-")  # that of constraints.txt
    (user,) = [rest for name, rest in steps if name == "USER"]
    number, group = user.split(":")
    for name in ("raycluster", "rayjob"):
        spec = cluster_spec(name)
        for part in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            context = part["template"]["spec"]["securityContext"]
            assert context == {"runAsNonRoot": True, "runAsUser": int(number), "runAsGroup": int(group), "fsGroup": int(group)}
    assert "-c constraints.txt" in " ".join(rest for name, rest in steps if name == "RUN")
