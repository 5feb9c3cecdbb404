"""Ranks are killed by SIGKILL at every phase of their start; torchrun restarts them, and the last attempt trains."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_support import ROOT, free_port

from sgpo_async.bench.namespaces import Namespace, network, why_not
from sgpo_async.errors import SgpoError

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]

PATIENCE_S = 400.0
SOME = ("1:trained", "0:agreed", "1:init", "0:trained")
ALL = (*SOME, "1:joining", "0:joining", "1:agreed", "0:init")
SCRIPT = str(Path(__file__).with_name("restart_member.py"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*words: str, restarts: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={restarts}", *words]


@pytest.mark.parametrize("deaths", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("rendezvous", ["static", pytest.param("standalone", marks=pytest.mark.slow)])
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


@pytest.fixture
def nodes() -> Iterator[list[Namespace]]:
    """Two network namespaces that reach each other and nothing else."""
    if reason := why_not():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(network(2))
        except SgpoError as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [SOME, ALL], ids=["some", "all"])
def test_ranks_of_two_nodes_that_are_killed_join_again(
    tmp_path: Path, nodes: list[Namespace], deaths: tuple[str, ...]
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
                        [*node.prefix, *command],
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
