"""A node that the network cuts off: no connection ends, packets only vanish, and later they arrive again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from run_support import assert_all_trained, real_run, until, users_torchrun

from sgpo_async.bench.namespaces import Namespace, network, why_not
from sgpo_async.transport.keys import create_keys

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "network namespaces"),
]
STEPS = 100_000  # more than the test lets it train


def set_link(node: Namespace, state: str) -> None:
    subprocess.run(["ip", "-n", node.name, "link", "set", node.device, state], check=True, timeout=60)


def impair(node: Namespace) -> None:
    """Delay, lose, repeat and reorder what this node sends; skips the test if the kernel cannot."""
    rules = ["delay", "30ms", "20ms", "loss", "2%", "duplicate", "1%", "reorder", "10%"]
    command = ["tc", "-n", node.name, "qdisc", "add", "dev", node.device, "root", "netem", *rules]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if "kind is unknown" in done.stderr:
        pytest.skip("this kernel has no netem")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_network_that_loses_and_reorders_packets_costs_no_rollout(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys")
    with network(2) as (centre, node):
        for one in (centre, node):
            impair(one)
        settings = ["steps=8", f"hub.address=tcp://{centre.address}:0", f"hub.keys={tmp_path / 'keys'}"]
        with real_run(tmp_path / "run", *settings) as run:
            hub = run.start("hub", "-m", "sgpo_async.cli", "hub", str(run.config), prefix=centre.prefix)
            address = ["--hub", run.address()]
            words = [*users_torchrun(1), "launch/learner.py", str(run.config), *address]
            learner = run.start("learner", *words, prefix=centre.prefix)
            words = ["launch/actor.py", *address, "--keys", str(tmp_path / "keys"), "--name", "far"]
            actor = run.start("far", *words, prefix=node.isolated)
            assert [process.wait(600) for process in (learner, hub, actor)] == [0] * 3, learner.output + actor.output
            assert_all_trained(run.summary()["ledger"], tasks=8 * 4, size=run.settings.rollout.size)
            assert run.summary()["rejected"] == 0


@pytest.mark.slow
def test_the_run_goes_on_without_a_node_that_is_cut_off_and_takes_it_back(tmp_path: Path) -> None:
    """The hub learns of it by silence alone. Its leases go to the other node; what it sends late is counted once."""
    create_keys(tmp_path / "keys")
    keys = ["--keys", str(tmp_path / "keys")]
    with network(3) as (centre, *nodes):
        settings = [f"hub.address=tcp://{centre.address}:0", f"hub.keys={tmp_path / 'keys'}", "hub.lease_timeout_s=8"]
        with real_run(tmp_path / "run", f"steps={STEPS}", *settings) as run:
            hub = run.start("hub", "-m", "sgpo_async.cli", "hub", str(run.config), prefix=centre.prefix)
            address = ["--hub", run.address()]
            learner = run.start(
                "learner", *users_torchrun(1), "launch/learner.py", str(run.config), *address, prefix=centre.prefix
            )
            cut, other = (
                run.start(name, "launch/actor.py", *address, *keys, "--name", name, prefix=node.isolated)
                for name, node in zip(("cut", "other"), nodes, strict=True)
            )
            for actor in (cut, other):
                until(lambda actor=actor: "joined the run" in actor.output, f"{actor.name} as a member")
            until(lambda: len(run.metrics()) >= 3, "three steps")
            set_link(nodes[0], "down")
            until(lambda: "cut has left" in hub.output, "the hub gives the node up")
            reached = len(run.metrics())
            until(lambda: len(run.metrics()) >= reached + 3, "three steps without the node")
            joined = hub.output.count("cut has joined")
            set_link(nodes[0], "up")
            until(lambda: hub.output.count("cut has joined") > joined, "the node as a member again")
            reached = len(run.metrics())
            until(lambda: len(run.metrics()) >= reached + 5, "five steps with the node")
            assert [process.process.poll() for process in (learner, hub, cut, other)] == [None] * 4, hub.output
            lines = run.metrics()
            assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
            for line in lines:
                rollouts = line["ledger"]["rollouts"]
                rest = rollouts["in_flight"] + rollouts["buffered"] + sum(rollouts["dropped"].values())
                assert rollouts["dispatched"] == rollouts["trained"] + rest, rollouts
                assert rollouts["trained"] == line["step"] * 4 * run.settings.rollout.size
