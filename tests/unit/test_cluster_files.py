"""The files of launch/cluster: each is accepted by its own tool or schema, and their commands by our own parsers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sgpo_async.config import Hub
from sgpo_async.transport.keys import create_keys, key_pair, public_key
from tests.cluster_files import CLUSTER, KUBERNETES, ROOT, documents, kubernetes_words, parsed, pods, recorded

BIN = Path(sys.executable).parent
SCRIPTS = sorted([*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch")])
VERSIONS = ("1.29", "1.37")  # of Kubernetes; both ends of what the schemas of the dev extra have
ROLES = {"hub": "hub", "learner": "learner", "actor": "actor"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_have_no_findings(script: Path) -> None:
    for command in (["bash", "-n"], [str(BIN / "shellcheck"), "--severity=style"]):
        done = subprocess.run([*command, str(script)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_has_no_findings() -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), str(CLUSTER / "docker/Dockerfile")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_images_get_the_packages_of_pyproject_and_no_secret(tmp_path: Path) -> None:
    text = (CLUSTER / "docker/Dockerfile").read_text()
    (code,) = re.findall(r'RUN python -c "(.*)"', text)
    printed = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert printed.splitlines() == needed
    versions = re.findall(r"sglang==[\d.]+", (ROOT / "docs/gpu.md").read_text())
    assert set(re.findall(r"sglang==[\d.]+", text)) == set(versions)
    ignored = (CLUSTER / "docker/Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert ignored[1] == "*" and all((ROOT / name).exists() for name in allowed)
    assert "launch/cluster/kubernetes/keys" in ignored


# ---- Kubernetes


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", documents(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_objects_obey_the_schemas_of_kubernetes(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def keyed(tmp_path: Path) -> Path:
    """A copy of kubernetes/ with keys."""
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    create_keys(folder / "keys")
    return folder


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("components", [False, True])
def test_kustomize_builds_all_of_it(tmp_path: Path, components: bool) -> None:
    folder = keyed(tmp_path)
    if components:
        file = folder / "kustomization.yaml"
        file.write_text(file.read_text().replace("# components: [dashboard, keda]", "components: [dashboard, keda]"))
    done = subprocess.run(["kubectl", "kustomize", str(folder)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout)}
    for (kind, _), one in built.items():
        if kind != "ScaledObject":
            kubernetes_validate.validate(one, VERSIONS[-1], strict=True)
        assert kind == "Namespace" or one["metadata"]["namespace"] == "sgpo"
    hub = built["Job", "sgpo-hub"]["spec"]["template"]["spec"]["containers"][0]
    assert hub["image"].startswith("registry.example.com/sgpo-hub:")
    assert ("hub.dashboard=0.0.0.0:8265" in hub["args"]) == components
    assert ("httpGet" in hub["readinessProbe"]) == components
    assert ("replicas" in built["Deployment", "sgpo-actor"]["spec"]) != components


def test_every_command_of_a_pod_is_one_that_exists() -> None:
    hub = parsed(kubernetes_words("hub", POD_IP="10.0.0.1"))
    learner = parsed(kubernetes_words("learner"))
    actor = parsed(kubernetes_words("actor", POD_NAME="sgpo-actor-1"))
    assert [one.name for one in (hub, learner, actor)] == ["hub", "learner", "actor"]
    assert hub.run and learner.run and learner.torchrun
    assert hub.run.hub.address == "tcp://10.0.0.1:5757" and hub.run.hub.keys == learner.run.hub.keys == actor.args.keys
    assert hub.run.name == learner.run.name == "sgpo" and actor.args.name == "sgpo-actor-1"
    gpus = {role: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for role, pod in pods().items()}
    assert gpus == {"hub": None, "learner": learner.torchrun.nproc_per_node, "actor": str(actor.args.servers)}
    assert (actor.args.servers, actor.args.tp) == (hub.run.engine.sglang.servers, hub.run.engine.sglang.tp)
    jobs = {one["metadata"]["name"]: one["spec"] for one in documents() if one["kind"] == "Job"}
    nodes = int(learner.torchrun.nnodes)
    assert jobs["sgpo-learner"]["completions"] == jobs["sgpo-learner"]["parallelism"] == nodes
    ranks = nodes * int(learner.torchrun.nproc_per_node)
    assert hub.run.learner.problems_per_step >= ranks


def test_services_lead_to_the_ports_that_the_commands_use() -> None:
    services = {one["metadata"]["name"]: one["spec"] for one in documents() if one["kind"] == "Service"}
    ports = {
        role: {port["name"]: port["containerPort"] for port in pod["containers"][0].get("ports", ())}
        for role, pod in pods().items()
    }
    labels = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in documents()
        if one["kind"] in ("Job", "Deployment")
    }
    for name, service in services.items():
        role = name.removeprefix("sgpo-")
        assert service["selector"].items() <= labels[name].items()
        assert {port["name"]: port["port"] for port in service["ports"]} == ports[role]
        assert all(port["targetPort"] == port["name"] for port in service["ports"])
    learner, actor = parsed(kubernetes_words("learner")), parsed(kubernetes_words("actor", POD_NAME="a"))
    assert learner.torchrun
    assert learner.args.hub == actor.args.hub == f"tcp://sgpo-hub:{ports['hub']['hub']}"
    host, _, port = learner.torchrun.rdzv_endpoint.partition(":")
    assert host == f"sgpo-learner-0.{pods()['learner']['subdomain']}" and int(port) == ports["learner"]["rendezvous"]
    assert pods()["learner"]["subdomain"] in services
    (policy,) = [one["spec"] for one in documents() if one["kind"] == "NetworkPolicy"]
    assert all(policy["podSelector"]["matchLabels"].items() <= label.items() for label in labels.values())


def test_every_pod_gets_the_keys_that_it_needs_and_no_others(tmp_path: Path) -> None:
    folder = keyed(tmp_path)
    generated = yaml.safe_load((folder / "kustomization.yaml").read_text())["secretGenerator"]
    files = {one["name"]: {Path(file).name for file in one["files"]} for one in generated}
    for role, pod in pods().items():
        (name,) = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        (init,) = pod["initContainers"]
        copied = {Path(word).name for word in init["command"] if word.startswith("/secret/")}
        assert files[name] == copied, "what the first container copies is what the Secret holds"
        own = tmp_path / role
        own.mkdir()
        words = [word.replace("/secret/", f"{folder}/keys/").replace("/keys", str(own)) for word in init["command"]]
        words = [word.replace(f"{folder}{own}", f"{folder}/keys") for word in words]
        subprocess.run(words, check=True)
        key_pair(own, {"hub": "server"}.get(role, role))
        public_key(own, "server")
    assert not {"server.key_secret", "learner.key_secret", "learner.key"} & files["sgpo-actor-keys"]
    assert "server.key_secret" not in files["sgpo-learner-keys"]


def test_pods_run_as_nobody_in_particular_and_mount_what_exists() -> None:
    claims = {one["metadata"]["name"] for one in documents() if one["kind"] == "PersistentVolumeClaim"}
    for role, pod in pods().items():
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert used <= claims and pod["terminationGracePeriodSeconds"] >= 60, role


def test_an_ended_learner_has_time_for_its_checkpoint() -> None:
    pod = pods()["learner"]
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


@pytest.mark.skipif("dashboard" not in Hub.__dataclass_fields__, reason="this release has no hub.dashboard")
def test_the_dashboard_component_sets_a_key_that_exists() -> None:
    text = (KUBERNETES / "dashboard/kustomization.yaml").read_text()
    (value,) = re.findall(r'value: "(hub\.dashboard=[^"]*)"', text)
    assert parsed([*kubernetes_words("hub", POD_IP="10.0.0.1"), value]).run


# ---- Slurm and SkyPilot


def test_the_commands_of_slurm_are_ones_that_exist(tmp_path: Path) -> None:
    groups = {"SLURM_JOB_NODELIST_HET_GROUP_0": "node[0-1]", "SLURM_JOB_NUM_NODES_HET_GROUP_0": "2"}
    groups |= {"SLURM_JOB_NUM_NODES_HET_GROUP_1": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sgpo"}
    groups |= {f"SLURM_CPUS_PER_TASK_HET_GROUP_{group}": "64" for group in (0, 1)}
    files = ["configs/paper-qwen2.5-7b.yaml", "launch/cluster/cluster.yaml"]
    script = (CLUSTER / "slurm/run.sbatch").read_text()
    commands = list(recorded(script, tmp_path, *files, **groups))
    assert ["sgpo-async", "keys", f"{tmp_path}/sgpo-keys"] in commands
    steps = {words[1].removeprefix("--job-name="): words for words in commands if words[0] == "srun"}
    hub, learner, actors = (parsed(inner(steps[name])) for name in ("hub", "learner", "actors"))
    assert hub.run and learner.run and learner.torchrun
    assert hub.run.hub.address == learner.args.hub == actors.args.hub == "tcp://10.0.0.1:5757"
    assert hub.run.hub.keys == learner.run.hub.keys == actors.args.keys == f"{tmp_path}/sgpo-keys"
    assert (learner.torchrun.nnodes, learner.torchrun.rdzv_id, learner.torchrun.node_rank) == ("2", "7", 5)
    assert learner.torchrun.master_addr == "10.0.0.1" and actors.args.servers == 8


def inner(words: list[str]) -> list[str]:
    """The command that srun is to start, as node 5 of its group sees it."""
    found = [word for word in words[1:] if not word.startswith("--")] if "bash" not in words else []
    if found:
        return words[words.index(found[0]) :]
    after = words[words.index("-c") + 2 :]
    return [after[0], "--node-rank", "5", *after[1:]]


def test_more_actors_on_slurm_find_the_hub_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "runs/sgpo").mkdir(parents=True)
    (tmp_path / "runs/sgpo/hub.json").write_text(
        '{"address": "tcp://10.0.0.9:5757", "pid": 7, "store": "/proc/7/fd/9"}'
    )
    script = (CLUSTER / "slurm/actors.sbatch").read_text()
    commands = list(recorded(script, tmp_path, WAIT_S="1"))
    actor = parsed(commands[0])
    assert actor.args.hub == "tcp://10.0.0.9:5757"


@pytest.mark.parametrize("name", ["learner", "actor"])
def test_the_commands_of_skypilot_are_ones_that_exist(tmp_path: Path, name: str) -> None:
    task = yaml.safe_load((CLUSTER / f"skypilot/{name}.yaml").read_text())
    assert task.keys() <= {"name", "num_nodes", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8"} | task["envs"] | {"HUB": "10.0.0.1"}
    (tmp_path / "keys").mkdir()
    commands = [parsed(words) for words in recorded(task["run"], tmp_path, **given)]
    found = {command.name: command for command in commands}
    if name == "actor":
        assert found.keys() == {"actor"} and found["actor"].args.hub == "tcp://10.0.0.1:5757"
        return
    assert found.keys() == {"hub", "learner"}
    hub, learner = found["hub"].run, found["learner"].run
    assert hub and learner and hub.hub.address == found["learner"].args.hub == "tcp://10.0.0.1:5757"
    assert hub.out != learner.out == "/shared/runs" and hub.name == learner.name == "sgpo"
