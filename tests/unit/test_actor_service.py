"""An actor's work: leases in, rollouts out, through lost connections and revoked leases."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rollout_support import TOKENIZER, ScriptedEngine, generated, lease

from sgpo_async.actor import service as actor_service
from sgpo_async.actor.membership import Membership
from sgpo_async.actor.senders import Senders
from sgpo_async.actor.service import Service
from sgpo_async.config import Run
from sgpo_async.engines.base import Failed, SampledTokens, ScoredCanary
from sgpo_async.errors import DeadlineExceeded, EngineError, SessionError
from sgpo_async.model.canary import PROMPT, TOKENS
from sgpo_async.session import SenderDown, SenderUp, VersionReceived
from sgpo_async.wire import records as wire
from sgpo_async.wire.records import (
    Ack,
    Canary,
    CloseSender,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    OpenSender,
    Progress,
    Ready,
    Release,
    Revoked,
    Rollout,
    Stop,
    Welcome,
)

SLOTS = 24  # three leases of Run(), and one more


class ScriptedHub:
    """A mailbox that delivers these messages once and keeps what is sent."""

    mismatch = ""

    def __init__(self, *messages: Message) -> None:
        self.dealer = SimpleNamespace(address="memory", connected=True, check_refused=lambda: None)
        self.connections = 1
        self.sent: list[Any] = []
        self.messages = list(messages)

    def receive(self, timeout_s: float) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages

    def send(self, message: Any) -> bool:
        self.sent.append(message)
        return True

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


class Node:
    """A weight receiver without events."""

    def __init__(self) -> None:
        self.addresses: list[tuple[str, int]] = []
        self.secrets: list[bytes] = []
        self.stopped = False

    def connect(self, host: str, port: int, secret: bytes) -> None:
        self.addresses.append((host, port))
        self.secrets.append(secret)

    def poll(self) -> list[Any]:
        return []

    def stop(self) -> None:
        self.stopped = True


class ScriptedSender:
    """A weight sender for the actor `name`, with these events."""

    host = "10.0.0.7"

    def __init__(self, name: str, road: str) -> None:
        self.name, self.road, self.stopped = name, road, threading.Event()
        self.events: list[Any] = []

    def poll(self) -> list[Any]:
        events, self.events = self.events, []
        return events

    def stop(self, deadline_s: float) -> None:
        self.stopped.set()


class Actor:
    """A service, its hub and its engine."""

    def __init__(self, *messages: Message) -> None:
        self.hub, self.engine = ScriptedHub(Welcome(run_id="run"), *messages), ScriptedEngine()
        self.engine.events = list  # type: ignore[attr-defined]
        self.started: list[ScriptedSender] = []
        self.membership = Membership(
            self.hub,  # type: ignore[arg-type]
            Hello(role="actor", name="a"),
            node=Node(),  # type: ignore[arg-type]
            start_node=Node,  # type: ignore[arg-type]
            timeout_s=600.0,
        )
        self.senders = Senders(self.spawn)  # type: ignore[arg-type]
        self.service = Service(
            mailbox=self.hub,  # type: ignore[arg-type]
            membership=self.membership,
            senders=self.senders,
            engine=self.engine,  # type: ignore[arg-type]
            tokenizer=TOKENIZER,
            run=Run(),
        )

    def spawn(self, name: str, road: str) -> ScriptedSender:
        sender = ScriptedSender(name, road)
        self.started.append(sender)
        return sender

    def round(self, *messages: Message, answers: Any = ()) -> str | None:
        """One round of the loop; returns the reason to end, if there is one."""
        self.hub.messages += messages
        self.engine.answers = list(answers)
        self.membership.advance(self.service._held())
        if reason := self.service.receive():
            return reason
        self.service.refresh()
        self.service.admit()
        self.service.generate()
        self.service.publish()
        return None

    def sent(self, kind: type) -> list[Any]:
        """What was sent of this kind since the last call."""
        found = self.hub.of(kind)
        self.hub.sent = [message for message in self.hub.sent if not isinstance(message, kind)]
        return found


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(actor_service, "HANDOVER_S", 0.05)
    yield


def sampled(tokens: int) -> SampledTokens:
    return SampledTokens(
        tokens=np.arange(tokens, dtype=np.int32),
        logprobs=np.zeros(tokens, np.float32),
        versions=np.array([0], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([tokens], np.int32),
    )


# ---- how many leases it asks for


def test_the_slots_of_short_rollouts_are_filled_while_the_long_ones_of_their_groups_go_on() -> None:
    actor = Actor()
    actor.round()
    (asked,) = actor.sent(Ready)
    assert asked.tasks == 7, "64 slots, leases of 12 rollouts, and one more"
    actor.round(*(lease(task, autonomous=12) for task in range(7)))
    actor.round()
    assert not actor.sent(Ready), "84 rollouts for 64 slots"
    short = [(task, 0, slot) for task in range(7) for slot in range(11)]
    actor.round(answers=[generated(key) for key in short[:9]])
    actor.round()
    assert [ready.tasks for ready in actor.sent(Ready)] == [1], "75 rollouts: less than a lease waits"
    actor.round(answers=[generated(key) for key in short[9:]])
    actor.round()
    assert sum(ready.tasks for ready in actor.sent(Ready)) == 5, "7 long rollouts are left, and one lease is on its way"


def test_an_actor_whose_verdicts_are_late_asks_for_no_more_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor()
    monkeypatch.setattr(actor.service._sampler._rewards, "poll", lambda wait_s: [])
    actor.round()
    total = 0
    while asked := sum(ready.tasks for ready in actor.sent(Ready)):
        tasks = range(total, total + asked)
        total += asked
        actor.round(*(lease(task, autonomous=12) for task in tasks))
        actor.round(answers=[generated((task, 0, slot)) for task in tasks for slot in range(12)])
        actor.round()
        assert total < 100
    assert 12 * total >= 64 + 64, "as many rollouts may wait for verdicts as there are slots, while these are full"


# ---- leases that arrive twice, or cannot be served


def test_a_lease_that_arrives_twice_is_served_once() -> None:
    """Found by `sgpo-async chaos --seed 1 --faults 200`: the actor ended with a KeyError at its second verdict."""
    actor = Actor(lease(7), lease(7))
    actor.round()
    actor.round(lease(7), answers=[generated((7, 0, 0))])
    assert [request.id for request in actor.engine.submitted] == [(7, 0, 0), (7, 0, 1)]
    assert [rollout.slot for rollout in actor.sent(Rollout)] == [0]


def test_a_failed_request_gives_its_lease_back_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    actor = Actor(lease(7), lease(8))
    actor.round()
    (asked,) = actor.sent(Ready)
    failed = Failed(id=(7, 0, 1), error=EngineError("request (7, 0, 1): 3 servers died while it ran on them"))
    actor.round(answers=[generated((8, 0, 0)), failed])
    [release] = actor.sent(Release)
    assert (release.task, release.servable) == (7, False) and "3 servers died" in release.reason
    assert "task 7: request (7, 0, 1): 3 servers died" in caplog.text
    assert [(rollout.task, rollout.slot) for rollout in actor.sent(Rollout)] == [(8, 0)]
    actor.round()
    assert [ready.tasks for ready in actor.sent(Ready)] == [1]  # in place of the one that was given back
    assert asked.tasks > 1
    actor.service._send_heartbeat(0.0)
    assert actor.sent(Heartbeat)[-1].tasks.tolist() == [8]


def test_a_lease_that_can_never_be_served_is_given_back_at_once() -> None:
    actor = Actor(lease(7), lease(8))
    actor.engine.refuses = (7, 0, 1)
    actor.round()
    [release] = actor.sent(Release)
    assert (release.task, release.servable) == (7, False) and "too long" in release.reason
    assert {request.id[0] for request in actor.engine.submitted[1:]} == {8}


# ---- connections


def test_a_lost_connection_costs_no_work() -> None:
    actor = Actor(lease(7), lease(8))
    actor.round(answers=[generated((7, 0, 0)), generated((8, 0, 0))])
    actor.round(Ack(task=8, attempt=0, slot=0))
    assert len(actor.sent(Rollout)) == 2
    actor.sent(Ready)
    actor.hub.connections += 1
    actor.round(answers=[generated((8, 0, 1))])
    hello = actor.sent(Hello)[-1]
    assert hello.holds.reshape(-1, 2).tolist() == [[7, 0], [8, 0]]
    assert not actor.sent(Rollout) and not actor.sent(Ready), "not a member at this moment"
    actor.engine.progress = lambda ids: {(7, 0, 1): sampled(3)} if (7, 0, 1) in ids else {}  # type: ignore[method-assign]
    actor.round(Welcome(run_id="run"))
    (report,) = actor.sent(Progress)
    assert [(part.slot, part.start, len(part.tokens)) for part in report.partial] == [(1, 0, 3)]
    delivered = {(rollout.task, rollout.slot) for rollout in actor.sent(Rollout)}
    assert delivered == {(7, 0), (8, 1)}, "the one that was not acknowledged, and the one that was finished meanwhile"
    (ready,) = actor.sent(Ready)
    assert ready.tasks == 7  # 63 free slots for leases of 12 rollouts, and one more
    assert not actor.engine.cancelled


def test_a_weight_receiver_that_ends_late_does_not_end_the_actor() -> None:
    actor = Actor(lease(7))
    actor.round()

    def stop() -> None:
        raise DeadlineExceeded("weight receiver", "end after SIGKILL", 5.0)

    actor.membership.node.stop = stop  # type: ignore[method-assign, assignment]
    actor.hub.connections += 1
    actor.round()
    assert len(actor.sent(Hello)) == 2


def test_a_finished_lease_is_held_until_all_its_rollouts_are_acknowledged() -> None:
    actor = Actor(lease(7))
    actor.round(answers=[generated((7, 0, 0)), generated((7, 0, 1))])
    assert actor.service._held() == [(7, 0)]
    actor.round(Ack(task=7, attempt=0, slot=0))
    assert actor.service._held() == [(7, 0)]
    actor.round(Ack(task=7, attempt=0, slot=1))
    assert actor.service._held() == []


def test_a_hub_of_another_run_ends_the_service() -> None:
    actor = Actor()
    actor.round()
    actor.hub.connections += 1
    assert actor.round(Welcome(run_id="another")) == "the hub belongs to another run"


def test_a_revoked_lease_is_dropped_with_all_that_belongs_to_it() -> None:
    actor = Actor(lease(7), lease(8))
    actor.round(answers=[generated((7, 0, 0))])
    actor.sent(Ready)
    actor.round(Revoked(task=7, attempt=0), answers=[generated((7, 0, 1)), generated((8, 0, 0))])
    assert actor.engine.cancelled == [(7, 0, 1)]
    assert [ready.tasks for ready in actor.sent(Ready)] == [1]
    actor.service._sender.resend()
    actor.sent(Rollout)
    actor.round(Revoked(task=7, attempt=0), Revoked(task=99, attempt=3))  # unknown leases change nothing
    assert [(rollout.task, rollout.slot) for rollout in actor.sent(Rollout)] == [(8, 0)]
    assert not actor.sent(Ready)


# ---- reports


def test_only_new_tokens_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = Actor(lease(7))
    known = {(7, 0, 0): 2, (7, 0, 1): 0}
    actor.engine.progress = lambda ids: {id: sampled(known[id]) for id in ids if known[id]}  # type: ignore[method-assign]
    actor.round()
    assert not actor.sent(Progress), "not due"
    for tokens, reported in [((2, 0), [(0, 0, 2)]), ((5, 1), [(0, 2, 3), (1, 0, 1)]), ((5, 1), [])]:
        known = {(7, 0, slot): count for slot, count in enumerate(tokens)}
        actor.service._progress_at -= 100.0
        actor.round()
        parts = [part for report in actor.sent(Progress) for part in report.partial]
        assert [(part.slot, part.start, len(part.tokens)) for part in parts] == reported


def test_an_engine_that_does_not_repeat_its_samples_delivers_with_the_reports() -> None:
    """Otherwise a killed actor would favour short rollouts; see `sgpo_async.rollout.partial`."""
    actor = Actor(lease(7))
    actor.engine.reproducible = False
    actor.round(answers=[generated((7, 0, 0))])
    assert not actor.sent(Rollout)
    assert actor.service._held() == [(7, 0)]
    actor.service._progress_at -= 100.0
    actor.engine.progress = lambda ids: {(7, 0, 1): sampled(3)}  # type: ignore[method-assign]
    actor.round()
    assert [rollout.slot for rollout in actor.sent(Rollout)] == [0]
    assert [part.slot for report in actor.sent(Progress) for part in report.partial] == [1]


def test_the_report_after_a_lost_connection_comes_with_what_was_finished_meanwhile() -> None:
    actor = Actor(lease(7))
    actor.engine.reproducible = False
    actor.round()
    actor.hub.connections += 1
    actor.round(answers=[generated((7, 0, 0))])
    actor.engine.progress = lambda ids: {(7, 0, 1): sampled(3)}  # type: ignore[method-assign]
    actor.service._progress_at += 100.0  # the next report would be due later
    actor.round(Welcome(run_id="run"))
    assert [part.slot for report in actor.sent(Progress) for part in report.partial] == [1]
    assert [rollout.slot for rollout in actor.sent(Rollout)] == [0]


def test_a_report_that_could_not_be_sent_is_made_up_for() -> None:
    """The hub ignores tokens if those before them are missing."""
    actor = Actor(lease(7))
    send, tokens = actor.hub.send, 2
    actor.engine.progress = lambda ids: {(7, 0, 0): sampled(tokens)}  # type: ignore[method-assign]
    actor.hub.send = lambda message: not isinstance(message, Progress) and send(message)  # type: ignore[method-assign]
    actor.service._progress_at -= 100.0
    actor.round()
    actor.hub.send, tokens = send, 5  # type: ignore[method-assign]
    actor.service._progress_at -= 100.0
    actor.round()
    (report,) = actor.sent(Progress)
    assert [(part.start, len(part.tokens)) for part in report.partial] == [(0, 5)]


@pytest.mark.usefixtures("patience")
def test_an_actor_that_leaves_hands_everything_over() -> None:
    actor = Actor(lease(7), lease(8))
    actor.engine.progress = lambda ids: {(7, 0, 1): sampled(3)}  # type: ignore[method-assign]
    actor.engine.reproducible = False
    actor.round(answers=[generated((7, 0, 0))])
    actor.hub.sent.clear()
    assert actor.service.serve(stopping=lambda: True) == "stopped"
    kinds = [type(message) for message in actor.hub.sent]
    assert kinds == [Progress, Rollout, Release, Release, Goodbye]
    assert {release.task for release in actor.sent(Release)} == {7, 8}


def test_the_end_of_the_run_ends_the_service() -> None:
    actor = Actor()
    actor.round()
    assert actor.round(Stop(reason="finished")) == "finished"
    assert actor.service.run_over


def test_weight_senders_are_opened_and_closed_as_the_hub_says() -> None:
    actor = Actor()
    actor.round(OpenSender(sender=4, name="b"), OpenSender(sender=5, name="c", road="sockets"))
    first, second = actor.started
    assert [(sender.name, sender.road) for sender in actor.started] == [("b", "rpc"), ("c", "sockets")]
    first.events.append(SenderUp(4000, b"s"))
    second.events.append(SenderDown("no such host"))
    actor.round()
    (up,), (down,) = actor.sent(wire.SenderUp), actor.sent(wire.SenderDown)
    assert (up.sender, up.host, up.port, up.secret) == (4, "10.0.0.7", 4000, b"s")
    assert (down.sender, down.reason) == (5, "no such host")
    actor.round(CloseSender(sender=4), CloseSender(sender=99))
    actor.senders.close_all()
    assert first.stopped.is_set() and second.stopped.is_set()


@pytest.mark.parametrize("error", [OSError("too many processes"), SessionError("too many processes")])
def test_a_weight_sender_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: str) -> ScriptedSender:
        raise error

    actor = Actor()
    monkeypatch.setattr(actor.senders, "_spawn", fail)
    actor.round(OpenSender(sender=4, name="b"))
    (down,) = actor.sent(wire.SenderDown)
    assert (down.sender, down.reason) == (4, "cannot start a weight sender: too many processes")
    actor.senders.close_all()


# ---- what the engine serves


def test_scores_of_the_canary_and_the_digest_of_the_weights_are_sent() -> None:
    actor = Actor()
    actor.round()
    ((canary, every_s),) = actor.engine.watched
    assert (len(canary.prompt), len(canary.tokens), every_s) == (PROMPT, TOKENS, Run().hub.canary_s)
    actor.sent(Heartbeat)
    actor.engine.digest = 5
    logprobs = np.array([-1.0], np.float32)
    actor.engine.scored = [ScoredCanary(engine="http://one", version=0, digest=5, logprobs=logprobs)]
    actor.round()
    (heartbeat,) = actor.sent(Heartbeat)  # at once: other weights of the same version are news
    assert (heartbeat.version, heartbeat.digest) == (0, 5)
    (sent,) = actor.sent(Canary)
    assert (sent.engine, sent.version, sent.digest, sent.logprobs.tolist()) == ("http://one", 0, 5, [-1.0])
    actor.round()
    assert actor.sent(Canary) == actor.sent(Heartbeat) == []


def test_a_version_that_was_published_again_with_other_content_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, loaded = Actor(), []
    monkeypatch.setattr(actor.service, "_load", lambda event: loaded.append(event.digest))
    actor.round()
    for digest in ("00" * 16, "01" * 16, "00" * 16):  # the engine serves version 0 with the digest 0
        event = VersionReceived(version=0, digest=digest, path="", published_at=0.0, nbytes=1, received=1, seconds=0.0)
        monkeypatch.setattr(actor.membership, "node_events", lambda event=event: [event])
        actor.service.refresh()
    assert loaded == ["01" * 16]


def test_time_without_work_because_of_the_weights_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without weights, and leases that need newer ones; not an engine without leases."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(actor_service.time, "monotonic", lambda: clock.now)
    actor = Actor()
    receive = actor.hub.receive

    def later(timeout_s: float) -> list[Message]:
        clock.now += 1.0
        return receive(timeout_s)

    monkeypatch.setattr(actor.hub, "receive", later)
    actor.round()
    assert actor.service._weights_s == 0.0, "the engine waits for leases"
    actor.round(replace(lease(1), min_version=actor.engine.version + 1))
    assert actor.service._weights_s == 0.0
    actor.round()
    assert actor.service._weights_s == 1.0, "its lease needs a newer version"
    monkeypatch.setattr(actor.engine, "version", None)
    actor.round()
    assert actor.service._weights_s == 2.0
