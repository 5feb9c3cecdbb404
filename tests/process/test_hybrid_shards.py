"""Two agents of two gloo ranks each: shards within a node, replicated between nodes, train like shards over the world.

torchrun gives each agent's ranks LOCAL_WORLD_SIZE=2, as if the agents were on two machines.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_support import ROOT, free_port

from tests.reference import learner_cases as cases
from tests.reference.objectives import reference_loss

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_S = 400.0
SCRIPT = str(Path(__file__).with_name("hybrid_member.py"))
RUN = cases.settings(row_tokens=20, teacher="ema", teacher_decay=0.7)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, port = tmp_path_factory.mktemp("hybrid"), free_port()
    cases.tiny_model(dtype=torch.float32).save_pretrained(folder / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    agents, log = [], folder / "log"
    try:
        for node in range(2):
            place = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
            command = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node=2", SCRIPT, str(folder)]
            with log.open("ab") as output:
                agents.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        statuses = [agent.wait(PATIENCE_S) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(60)
    assert statuses == [0, 0], log.read_text()[-4000:]
    return torch.load(folder / "found.pt")


def test_parameters_are_sharded_within_a_node(found: dict[str, Any]) -> None:
    assert (found["node"]["shape"], found["world"]["shape"]) == ((2, 2), (4,))
    whole = sum(p.numel() for p in cases.tiny_model().parameters())
    assert whole / 2 <= found["node"]["held"] < 0.6 * whole
    assert whole / 4 <= found["world"]["held"] < 0.35 * whole


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("over", ["node", "world"])
def test_gradients_equal_the_reference_over_all_ranks(found: dict[str, Any], over: str, size: str) -> None:
    model, teacher = (cases.tiny_model(dtype=torch.float32).double() for _ in range(2))
    reference_loss(model, cases.groups(), RUN, teacher=teacher).backward()
    for name, parameter in model.named_parameters():
        gradient = found[over][size]["gradient"][name].double()
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_gradients_are_reduced_between_nodes_once_per_step(found: dict[str, Any]) -> None:
    """Once for each group of parameters: a small model is one group, here a large one has two layers and the rest."""
    assert found["node"]["small"]["micro-batches"] > 1
    assert (found["node"]["small"]["between nodes"], found["node"]["large"]["between nodes"]) == (1, 3)
    assert found["world"]["small"]["between nodes"] == found["world"]["large"]["between nodes"] == 0


def test_steps_and_clipping_are_those_of_shards_over_the_world(found: dict[str, Any]) -> None:
    for own, other in zip(found["node"]["metrics"], found["world"]["metrics"], strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert found["node"]["metrics"][0]["grad_norm"] > RUN.optim.grad_clip  # so that the gradient was scaled
    for name, tensor in found["world"]["weights"].items():
        torch.testing.assert_close(found["node"]["weights"][name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("over", ["node", "world"])
def test_publication_has_the_trained_weights(found: dict[str, Any], over: str) -> None:
    initial = dict(cases.tiny_model(dtype=torch.float32).named_parameters())
    assert found[over]["published"].keys() == found[over]["weights"].keys() == initial.keys()
    for name, tensor in found[over]["weights"].items():
        assert torch.equal(found[over]["published"][name], tensor)
    assert not all(torch.equal(tensor, initial[name]) for name, tensor in found[over]["weights"].items())


@pytest.mark.parametrize(("over", "members", "senders"), [("node", [0, 1], []), ("world", [0, 1, 2, 3], [2, 3])])
def test_the_ranks_that_share_the_parameters_with_rank_0_publish_them(
    found: dict[str, Any], over: str, members: list[int], senders: list[int]
) -> None:
    """Those of the other node, which cannot open the store, send their bytes."""
    store = found[over]["store"]
    assert (store["members"], store["senders"]) == (members, senders)
    assert store["tensors"].keys() == found[over]["weights"].keys()
    assert all(torch.equal(store["tensors"][name], tensor) for name, tensor in found[over]["weights"].items())


@pytest.mark.parametrize("over", ["node", "world"])
def test_a_resumed_run_continues_bit_for_bit(found: dict[str, Any], over: str) -> None:
    assert found[over]["resumed"] == found[over]["metrics"]
    for name, tensor in found[over]["weights"].items():
        assert torch.equal(found[over]["resumed weights"][name], tensor)


def test_shards_within_a_node_can_be_resumed_as_shards_over_the_world(found: dict[str, Any]) -> None:
    (line,) = found["crossed"]
    for key in ("loss", "grad_norm"):
        assert line[key] == pytest.approx(found["node"]["metrics"][2][key], rel=1e-4)
