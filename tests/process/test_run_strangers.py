"""Strangers on the hub's machine, while a run goes on: they are refused, and the run ends with its result."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from run_support import RealRun, assert_all_trained, real_run, until

from sgpo_async.transport import Dealer, Mailbox, create_keys
from sgpo_async.wire import records as wire
from sgpo_async.wire.records import Message

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]
STEPS = 20
HELLO = wire.Hello(role="learner", name="learner-0", world_size=1, tokenizer="0123456789abcdef")
REQUESTS: list[Message] = [
    wire.BatchRequest(step=0),
    wire.Commit(step=0),
    wire.Published(version=10**6, store="/etc/passwd"),
    wire.Evaluate(version=0),
    wire.SnapshotRequest(step=0),
    wire.Restore(state=b"garbage"),
    wire.Finish(reason="a stranger's"),
]
STRANGER = Path(__file__).with_name("rpc_stranger.py")
SENDER = "sgpo_async.session.sender"


def refusals_of(mailbox: Mailbox, messages: list[Message]) -> list[str]:
    """The hub's reasons for refusing each of these messages; nothing else may come."""
    reasons = []
    for message in messages:
        mailbox.send(message)
        answers = until(lambda: mailbox.receive(0.1), f"an answer to {type(message).__name__}")
        assert [type(answer) for answer in answers] == [wire.Refused], answers
        reasons += [answer.reason for answer in answers]
    return reasons


def waiting_senders(run: RealRun) -> dict[int, int]:
    """Weight senders that wait for their receiver: process id -> port of their rendezvous."""
    found = {}
    for process in run.processes_with(SENDER):
        with suppress(psutil.Error):  # its session has just ended
            ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            if len(ports) == 1:
                found[process.pid] = ports.pop()
    return found


@contextmanager
def rpc_strangers(run: RealRun, folder: Path) -> Iterator[Callable[[], int]]:
    """Within this context, strangers go to every rendezvous; the yielded function sends new ones, and counts them."""
    started: dict[int, subprocess.Popen[bytes]] = {}

    def visit() -> int:
        for pid, port in waiting_senders(run).items():
            if pid not in started:
                command = [sys.executable, str(STRANGER), str(port), str(folder)]
                started[pid] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        return len(started)

    try:
        yield visit
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def test_a_stranger_without_keys_is_neither_learner_nor_inference_node(tmp_path: Path) -> None:
    with real_run(tmp_path / "a", f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0") as run:
        hub = run.hub()
        stranger = Mailbox(Dealer(run.address(), max_bytes=2**20))
        first = refusals_of(stranger, [HELLO, *REQUESTS])
        learner = run.learner("--hub", run.address())
        until(lambda: run.status()["learner"]["ranks"] == 2, "the learner")
        with rpc_strangers(run, tmp_path) as visit:
            actor = run.actor("actor")
            until(visit, "a weight sender that waits")
            until(lambda: visit() and len(run.metrics()) > 2, "three steps")
            later = refusals_of(stranger, [HELLO, *REQUESTS])
            assert learner.wait() == 0, learner.output
        assert actor.wait() == 0 and hub.wait() == 0, hub.output
        needed = f"a learner without keys must know the token in {run.folder}/hub.token: start it as the hub's user"
        for reasons in (first, later):
            assert reasons[0].startswith(needed)
            assert {reason.partition(":")[0] for reason in reasons[1:]} == {"not a member, or removed after a timeout"}
        (line,) = [line for line in hub.output.splitlines() if "a message was refused" in line]
        assert needed in line
        assert not (tmp_path / "made").exists()
        assert run.summary()["ledger"]["trained"] == STEPS * 4
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        assert_all_trained(run.summary()["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)
        run.assert_cleaned_up()
        assert not (run.folder / "hub.token").exists()
        stranger.close()


def folder_with(keys: Path, folder: Path, *names: str) -> Path:
    """A folder with these files of `keys`, as on another node."""
    folder.mkdir()
    for name in names:
        shutil.copy(keys / name, folder)
    return folder


def test_with_keys_an_actor_cannot_be_the_learner(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    create_keys(keys)
    of_actors = folder_with(keys, tmp_path / "node", "server.key", "actor.key", "actor.key_secret")
    of_learners = folder_with(keys, tmp_path / "trainer", "server.key", "learner.key", "learner.key_secret")
    with real_run(tmp_path / "a", f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", f"hub.keys={keys}") as run:
        hub = run.hub()
        stranger = Mailbox(Dealer(run.address(), keys=of_actors, max_bytes=2**20))
        learner = run.learner("--hub", run.address(), f"hub.keys={of_learners}")
        actor = run.actor("actor", "--keys", str(of_actors))
        until(lambda: len(run.metrics()) > 2, "three steps")
        reasons = refusals_of(stranger, [HELLO, *REQUESTS])
        assert learner.wait() == 0, learner.output
        assert actor.wait() == 0 and hub.wait() == 0, hub.output
        assert {reason.partition(" ")[2] for reason in reasons} == {
            "of a learner needs the learner's key: give the learner a hub.keys with learner.key_secret of this hub"
        }
        assert hub.output.count("a message was refused") == 1
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        run.assert_cleaned_up()
        stranger.close()


def test_a_learner_with_the_actors_files_only_ends_with_one_line(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    create_keys(keys)
    of_actors = folder_with(keys, tmp_path / "node", "server.key", "actor.key", "actor.key_secret")
    with real_run(tmp_path / "a", "hub.address=tcp://127.0.0.1:0", f"hub.keys={keys}") as run:
        hub = run.hub()
        learner = run.learner("--hub", run.address(), f"hub.keys={of_actors}", ranks=1)
        assert learner.wait() != 0
        assert f"hub.keys: {of_actors}/learner.key_secret is missing or holds no key; make keys" in learner.output
        hub.process.terminate()
        assert hub.wait() == 128 + 15


def test_a_learner_in_another_folder_learns_where_the_token_is(tmp_path: Path) -> None:
    with real_run(tmp_path / "a", "hub.address=tcp://127.0.0.1:0") as run:
        hub = run.hub()
        learner = run.learner("--hub", run.address(), f"out={tmp_path / 'b'}", ranks=1)
        assert learner.wait() != 0
        assert f"must know the token in {run.folder}/hub.token: start it as the hub's user" in learner.output
        assert (run.folder / "hub.token").stat().st_mode & 0o077 == 0
        hub.process.terminate()
        assert hub.wait() == 128 + 15
