"""Ranks are killed by SIGKILL at every phase of their start; torchrun restarts them, and the last attempt trains."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_support import ROOT, free_port

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]

PATIENCE_S = 400.0
SOME = ("1:trained", "0:agreed", "1:init", "0:trained")
ALL = (*SOME, "1:joining", "0:joining", "1:agreed", "0:init")
SCRIPT = str(Path(__file__).with_name("restart_member.py"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*words: str, restarts: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}", *words]


@pytest.mark.parametrize("deaths", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("rendezvous", ["static", "standalone"])
def test_ranks_of_one_node_that_are_killed_join_again(tmp_path: Path, rendezvous: str, deaths: tuple[str, ...]) -> None:
    place = {
        "static": ["--master-addr=127.0.0.1", f"--master-port={free_port()}"],
        "standalone": ["--standalone", "--local-addr=127.0.0.1"],
    }[rendezvous]
    command = torchrun(*place, "--nproc-per-node=2", SCRIPT, str(tmp_path / "sum"), *deaths, restarts=len(deaths))
    with (tmp_path / "log").open("wb") as log:
        status = subprocess.run(
            command, check=False, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, timeout=PATIENCE_S
        ).returncode
    assert status == 0, (tmp_path / "log").read_text()[-4000:]
    assert [(tmp_path / f"sum.{rank}").read_text() for rank in range(2)] == [f"3 {len(deaths)}"] * 2


@dataclass(frozen=True)
class Node:
    """A network namespace with its own address."""

    name: str
    device: str
    address: str


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two network namespaces that reach each other by a veth pair and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip (apt-get install iproute2)")
    mark = uuid.uuid4().hex[:6]
    made = [Node(f"sgpo-{mark}-{i}", f"sg{mark}{i}", f"10.77.0.{i + 1}") for i in range(2)]
    try:
        try:
            for node in made:
                _ip("netns", "add", node.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
        _ip("link", "add", made[0].device, "type", "veth", "peer", "name", made[1].device)
        for node in made:
            _ip("link", "set", node.device, "netns", node.name)
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.device)
            _ip("-n", node.name, "link", "set", node.device, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
        yield made
    finally:
        for node in made:
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True, timeout=60)


@pytest.mark.parametrize("deaths", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_ranks_of_two_nodes_that_are_killed_join_again(
    tmp_path: Path, nodes: list[Node], deaths: tuple[str, ...]
) -> None:
    """The count of restarts differs between the agents: each counts only the deaths of its own ranks."""
    agents, logs = [], []
    try:
        for node in nodes:
            command = torchrun(
                "--nnodes=2",
                "--nproc-per-node=1",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={nodes[0].address}:29400",
                f"--rdzv-conf=is_host={int(node is nodes[0])}",
                "--rdzv-id=two-nodes",
                f"--local-addr={node.address}",
                SCRIPT,
                str(tmp_path / "sum"),
                *deaths,
                restarts=len(deaths),
            )
            logs.append(tmp_path / f"{node.name}.log")
            with logs[-1].open("wb") as log:
                agents.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", node.name, *command],
                        env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": node.device},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            statuses = [agent.wait(PATIENCE_S) for agent in agents]
        except subprocess.TimeoutExpired:
            statuses = []
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(60)
    assert statuses == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    found = [(tmp_path / f"sum.{rank}").read_text().split() for rank in range(2)]
    assert [total for total, _ in found] == ["3", "3"]
    assert sum(int(count) for _, count in found) >= len(deaths)
    assert max(int(count) for _, count in found) < len(deaths)
