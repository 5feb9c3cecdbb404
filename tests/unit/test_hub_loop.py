"""The loop around the core, with the in-memory transport and with fake weight senders that are plain objects."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from hub_support import Source, make_rollout, make_run

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.hub import HubCore
from sgpo_async.hub.authority import Authority
from sgpo_async.hub.loop import Loop
from sgpo_async.hub.service import contact_file
from sgpo_async.session import SenderDown, SenderEvent, SenderUp
from sgpo_async.transport import Mailbox, MemoryDealer, MemoryRouter, RouterMailbox
from sgpo_async.wire import records as wire

DEADLINE_S = 120.0


class FakeSender:
    """A weight sender that is up at once."""

    host = "127.0.0.1"

    def __init__(self, name: str) -> None:
        self.name, self.stopped = name, False
        self.events: deque[SenderEvent] = deque([SenderUp(4000)])

    def poll(self) -> list[SenderEvent]:
        return [self.events.popleft() for _ in range(len(self.events))]

    def stop(self, deadline_s: float) -> None:
        assert deadline_s > 0
        self.stopped = True


class FakeWeights:
    """Instead of `hub.learner_weights`."""

    def use(self, path: str) -> bool:
        return path == "/another"

    def offered(self, member: bytes, message: wire.Published) -> wire.Published:
        return message

    def events(self) -> list[object]:
        return []


class Running:
    """A loop in a thread, and its weight senders."""

    def __init__(self, router: MemoryRouter, authority: Authority = Authority()) -> None:  # noqa: B008 (immutable)
        self.router, self.senders, self.reason, self.ended = router, [], "", ""
        core = HubCore(make_run(batch=1, steps=1), Source(held_out=1), store="/store")
        self.loop = Loop(
            core,
            mailbox=RouterMailbox(router),
            authority=authority,
            spawn_sender=self.spawn_sender,
            weights=FakeWeights(),  # type: ignore[arg-type]
        )
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def spawn_sender(self, name: str, road: str) -> FakeSender:
        if name == "cannot start":
            raise OSError("no more processes")
        self.senders.append(FakeSender(name))
        return self.senders[-1]

    def run(self) -> None:
        self.ended = self.loop.run(interrupted=lambda: self.reason)

    def join(self) -> None:
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


class Member(Mailbox):
    def __init__(self, dealer: MemoryDealer) -> None:
        super().__init__(dealer)
        self.got: list[wire.Message] = []

    def wait(self, kind: type):
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for message in self.got:
                if isinstance(message, kind):
                    self.got.remove(message)
                    return message
            self.got += self.receive(0.1)
        raise AssertionError(f"no {kind.__name__}; got {self.got}")


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running(MemoryRouter())
    yield running
    running.reason = running.reason or "the test is over"
    running.join()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_loop_carries_a_whole_run(running):
    learner, actor = Member(running.router.dealer(b"l")), Member(running.router.dealer(b"a"))
    learner.send(wire.Hello(role="learner", name="learner-0"))
    assert learner.wait(wire.Welcome).store == "/store"
    learner.send(wire.Published(version=0))
    actor.send(wire.Hello(role="actor", name="a"))
    assert actor.wait(wire.Welcome).session_port == 4000
    actor.send(wire.Ready(tasks=2, version=0))
    for _ in range(2):
        lease = actor.wait(wire.Lease)
        for slot in range(lease.autonomous + lease.guided):
            actor.send(make_rollout(lease, slot))
    learner.send(wire.BatchRequest(step=0))
    assert len(learner.wait(wire.Shard).rollouts) == 3
    learner.send(wire.Commit(step=0))
    assert learner.wait(wire.Committed).status["ledger"]["trained"] == 1
    assert learner.wait(wire.Evaluated).pass_auto == 1.0
    learner.send(wire.Finish())
    actor.wait(wire.Stop)
    actor.send(wire.Goodbye())
    learner.send(wire.Goodbye())
    running.join()
    assert running.ended == "finished" and all(sender.stopped for sender in running.senders)


def test_undecodable_messages_are_counted_as_rejected(running):
    dealer = running.router.dealer(b"x")
    for frames in ([b"garbage"], [], [b"\x01\x81"], [b"\x09" + b"\x80"]):
        dealer.send(frames)
    observer = Member(dealer)
    assert observer.wait(wire.Refused).reason.startswith("protocol: the other side uses version 103, ")
    observer.send(wire.StatusRequest())
    assert observer.wait(wire.Status).status["rejected"] == 4


def test_a_dead_weight_sender_ends_only_its_own_session(running):
    actor = Member(running.router.dealer(b"a"))
    actor.send(wire.Hello(role="actor", name="a"))
    actor.wait(wire.Welcome)
    running.senders[0].events.append(SenderDown("killed"))
    assert "killed" in actor.wait(wire.Refused).reason
    eventually(lambda: running.senders[0].stopped)
    assert running.thread.is_alive()


def test_sessions_begin_again_when_the_learner_publishes_into_another_store(running):
    """A hub that is started again before the first publication has an empty store of its own."""
    learner, actor = Member(running.router.dealer(b"l")), Member(running.router.dealer(b"a"))
    learner.send(wire.Hello(role="learner", name="learner-0"))
    learner.wait(wire.Welcome)
    actor.send(wire.Hello(role="actor", name="a"))
    actor.wait(wire.Welcome)
    learner.send(wire.Published(version=0, store="/another"))
    assert "another weight store" in actor.wait(wire.Refused).reason
    actor.send(wire.Hello(role="actor", name="a"))
    actor.wait(wire.Welcome)
    learner.send(wire.Published(version=0, store="/another"))
    learner.send(wire.StatusRequest())
    learner.wait(wire.Status)
    first, second = running.senders
    eventually(lambda: first.stopped)
    assert not second.stopped


def test_an_interrupt_stops_all_members_and_weight_senders(running):
    actor = Member(running.router.dealer(b"a"))
    actor.send(wire.Hello(role="actor", name="a"))
    actor.wait(wire.Welcome)
    running.reason = "SIGTERM"
    assert actor.wait(wire.Stop).reason == "SIGTERM"
    running.join()
    assert running.ended == "SIGTERM" and running.senders[0].stopped


def test_a_weight_sender_that_cannot_start_ends_only_its_own_session(running):
    failing, working = Member(running.router.dealer(b"u")), Member(running.router.dealer(b"l"))
    failing.send(wire.Hello(role="actor", name="cannot start"))
    assert "no more processes" in failing.wait(wire.Refused).reason
    working.send(wire.Hello(role="actor", name="a"))
    assert working.wait(wire.Welcome).session_port == 4000


def test_a_message_too_large_for_its_member_becomes_a_refusal():
    router = MemoryRouter(max_bytes=500)  # the settings alone are larger
    running = Running(router)
    member = Member(router.dealer(b"m"))
    member.send(wire.SettingsRequest())
    assert "hub.max_message_mb" in member.wait(wire.Refused).reason
    running.reason = "the test is over"
    running.join()


def test_a_weight_sender_that_ends_late_is_logged_and_the_run_continues(running, caplog):
    actor = Member(running.router.dealer(b"a"))
    actor.send(wire.Hello(role="actor", name="a"))
    actor.wait(wire.Welcome)

    def fail(deadline_s: float) -> None:
        raise DeadlineExceeded("weight sender of a", "end after SIGKILL", deadline_s)

    running.senders[0].stop = fail
    running.reason = "the test is over"
    running.join()
    assert running.ended == "the test is over"
    assert "weight sender of a" in caplog.text


def test_the_contact_file_is_written_atomically_and_removed(tmp_path):
    path = tmp_path / "hub.json"
    with contact_file(path, {"address": "tcp://127.0.0.1:1"}):
        assert path.read_text() == '{"address": "tcp://127.0.0.1:1"}'
        assert [p.name for p in tmp_path.iterdir()] == ["hub.json"]
    assert not list(tmp_path.iterdir())
