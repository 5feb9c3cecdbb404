"""Strangers on the hub's machine, while a run goes on: they are refused, and the run ends with its result."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from run_support import PATIENCE_S, RealRun, assert_all_trained, real_run, suspended, until

from sgpo_async.errors import HubError
from sgpo_async.transport import Dealer, Mailbox, create_keys
from sgpo_async.transport.keys import add_actors, key_pair, revoke
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


@pytest.mark.slow
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
            token = (run.folder / "hub.token").read_bytes().strip()
            assert learner.wait() == 0, learner.output
        assert actor.wait() == 0 and hub.wait() == 0, hub.output
        assert_nowhere([token], tmp_path / "a")
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


def names_of_actors(mailbox: Mailbox) -> set[str]:
    """The actors of the run, as the hub tells everybody who has a key."""
    mailbox.send(wire.StatusRequest())
    answers = until(lambda: mailbox.receive(0.1), "the status")
    return {row["name"] for answer in answers if isinstance(answer, wire.Status) for row in answer.status["actors"]}


def assert_nowhere(secrets: list[bytes], folder: Path) -> None:
    """No file in the folder holds one of the secrets: logs, what processes printed, metrics, the journal."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and all(len(secret) >= 40 for secret in secrets)
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []


def test_with_keys_nobody_without_the_right_one_takes_part_and_a_node_can_be_shut_out(tmp_path: Path) -> None:
    keys, others = tmp_path / "keys", tmp_path / "others"
    add_actors(keys, ["good", "bad"])
    add_actors(others, ["good"])
    shutil.copy(keys / "server.key", others)
    of_good = folder_with(keys, tmp_path / "good", "server.key", "actor-good.key_secret")
    of_bad = folder_with(keys, tmp_path / "bad", "server.key", "actor-bad.key_secret")
    of_learners = folder_with(keys, tmp_path / "trainer", "server.key", "learner.key", "learner.key_secret")
    with real_run(tmp_path / "a", f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", f"hub.keys={keys}") as run:
        hub = run.hub()
        strangers = [Mailbox(Dealer(run.address(), keys=folder, max_bytes=2**20)) for folder in ("", others, of_bad)]
        *outside, member = strangers
        actor, bad = run.actor("actor", "--keys", str(of_good)), run.actor("bad", "--keys", str(of_bad))
        until(lambda: names_of_actors(member) == {"actor", "bad"}, "both actors")
        learner = run.learner("--hub", run.address(), f"hub.keys={of_learners}")
        until(lambda: len(run.metrics()) > 0, "a step")
        with suspended(run.processes_with("launch/learner.py")):  # so that the run does not end meanwhile
            reasons = refusals_of(member, [HELLO, *REQUESTS])
            for stranger in outside:
                for message in (HELLO, wire.Hello(role="actor", name="x"), *REQUESTS, wire.StatusRequest()):
                    stranger.send(message)
                with pytest.raises(HubError, match="refuses the connection"):
                    stranger.dealer.wait_connected(PATIENCE_S)  # type: ignore[attr-defined]
                assert stranger.receive(0.0) == []
            assert_nowhere([key_pair(path.parent, path.stem)[1] for path in keys.glob("*.key_secret")], run.folder)
            revoke(keys, "bad")
            assert bad.wait() != 0
        assert "the key bad was revoked" in bad.output or "does not know this side's key" in bad.output, bad.output
        assert hub.output.count("the key bad was revoked; expelled: bad") == 1, hub.output
        late = Dealer(run.address(), keys=of_bad, max_bytes=2**20)
        with pytest.raises(HubError, match="it does not know this side's key"):
            late.wait_connected(PATIENCE_S)
        assert learner.wait() == 0, learner.output
        assert actor.wait() == 0 and hub.wait() == 0, hub.output
        assert {reason.partition(" ")[2] for reason in reasons} == {
            "of a learner needs the learner's key: give the learner a hub.keys with learner.key_secret of this hub"
        }
        assert hub.output.count("a message was refused") == 1
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        assert_all_trained(run.summary()["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)
        run.assert_cleaned_up()
        kept = [*keys.glob("*.key_secret"), of_bad / "actor-bad.key_secret"]
        assert_nowhere([key_pair(path.parent, path.stem)[1] for path in kept], tmp_path / "a")
        for end in (*strangers, late):
            end.close()


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
