"""Actors that pass the weights on: one copy from the hub, one store for a machine, and a source that is killed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest
from run_support import RealRun, RunProcess, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]
CHAIN = ("a", "b")  # each with a store of its own, as on a machine of its own
SHARING = ("d", "e")
STEPS = 100_000  # more than the test lets it train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRun]:
    # Only the ends of connections can tell the hub that an actor is dead.
    overrides = ("hub.address=tcp://127.0.0.1:0", "hub.weight_fanout=1", f"steps={STEPS}", "hub.lease_timeout_s=3600")
    with real_run(tmp_path_factory.mktemp("routes"), *overrides) as started:
        yield started


def join(run: RealRun, name: str, *arguments: str) -> RunProcess:
    actor = run.actor(name, *arguments)
    until(lambda: run.actor_row(name).get("tokens"), f"tokens of {name}")
    return actor


def source(run: RealRun, name: str) -> str:
    return str(run.actor_row(name).get("source"))


def senders(run: RealRun, of: RunProcess) -> int:
    """The weight senders that are children of this process."""
    return sum(
        process.ppid() == of.process.pid and "sgpo_async.session.sender" in process.cmdline()
        for process in run.processes()
    )


@pytest.mark.slow
def test_weights_reach_every_actor_and_a_lost_source_is_replaced(run: RealRun) -> None:
    hub = run.hub()
    run.learner("--hub", run.address(), ranks=1)
    actors = {name: join(run, name, "--own-store") for name in CHAIN}
    actors |= {name: join(run, name) for name in SHARING}
    assert [source(run, name) for name in (*CHAIN, *SHARING)] == ["", "a", "b", "d"]
    assert senders(run, hub) == 1, "the hub sends one copy"
    assert [senders(run, actors[name]) for name in (*CHAIN, *SHARING)] == [1, 1, 0, 0]
    assert_all_follow(run, (*CHAIN, *SHARING))

    actors["a"].process.send_signal(signal.SIGKILL)
    until(lambda: source(run, "b") == "", "weights of b from the hub")
    assert_all_follow(run, ("b", *SHARING))
    actors["d"].process.send_signal(signal.SIGKILL)
    until(lambda: source(run, "e") == "b", "weights of e from b")
    assert_all_follow(run, ("b", "e"))
    assert senders(run, hub) == 1
    last = join(run, "f")
    assert source(run, "f") == "e", "it reads the store of e"
    last.process.send_signal(signal.SIGKILL)
    until(lambda: not run.actor_row("f"), "the end of f's membership")

    status = run.status()
    assert status["ledger"]["rollouts"]["dropped"].get("rejected", 0) == 0
    assert status["rejected"] == 0
    assert re.search(r"joined the run at \S+; weights from b", actors["e"].output)


def assert_all_follow(run: RealRun, names: tuple[str, ...]) -> None:
    """Wait until all of these actors serve a version that was published after now."""
    published = run.status()["published"]
    until(
        lambda: all(run.actor_row(name).get("version", -1) > published for name in names),
        f"a version after {published} at {names}",
    )
