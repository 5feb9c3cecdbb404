"""When an actor says Hello, and for how long it looks for the hub."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from test_actor_service import Node, ScriptedHub

from sgpo_async.actor import membership as actor_membership
from sgpo_async.actor.membership import BACKOFF_S, PROVEN_S, REPEAT_S, Membership
from sgpo_async.errors import DeadlineExceeded, HubError, Refusal
from sgpo_async.session import ReceiverDown, VersionAnnounced, VersionReceived
from sgpo_async.weights import StoreFile, StoreWriter
from sgpo_async.wire.records import Hello, Refused, Welcome

TAKEN = Refused(reason="the name 'a' is taken")
TIMEOUT_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(actor_membership, "time", clock)
    return clock


class Member:
    def __init__(self) -> None:
        self.hub, self.nodes = ScriptedHub(), [Node()]
        self.membership = Membership(
            self.hub,  # type: ignore[arg-type]
            Hello(role="actor", name="a", tokenizer="9f2c"),
            node=self.nodes[0],  # type: ignore[arg-type]
            start_node=self.start_node,  # type: ignore[arg-type]
            timeout_s=TIMEOUT_S,
        )

    def start_node(self) -> Node:
        self.nodes.append(Node())
        return self.nodes[-1]

    def hellos(self) -> list[Hello]:
        found, self.hub.sent = self.hub.sent, []
        return found


@pytest.fixture
def member(clock: Clock) -> Member:
    return Member()


def test_it_says_hello_again_until_it_is_welcome(member: Member, clock: Clock) -> None:
    member.membership.advance([])
    member.membership.advance([])
    (hello,) = member.hellos()
    assert (hello.name, hello.tokenizer, hello.holds.size) == ("a", "9f2c", 0)
    clock.now += REPEAT_S
    member.membership.advance([])
    assert len(member.hellos()) == 1
    assert member.membership.welcomed(Welcome(run_id="run", session_host="h", session_port=7))
    assert member.membership.serving
    assert member.nodes[0].addresses == [("h", 7)]
    clock.now += 100 * REPEAT_S
    member.membership.advance([])
    assert not member.hellos()


def test_a_new_connection_means_a_new_hello_and_a_new_weight_receiver(member: Member) -> None:
    member.membership.advance([])
    member.membership.welcomed(Welcome(run_id="run"))
    member.hellos()
    member.hub.connections += 1
    member.membership.advance([(7, 1), (9, 0)])
    (hello,) = member.hellos()
    assert hello.holds.tolist() == [7, 1, 9, 0]
    assert not member.membership.serving
    assert [node.stopped for node in member.nodes] == [True, False]
    assert member.membership.node is member.nodes[1]


def test_a_connection_that_is_away_ends_the_membership(member: Member, clock: Clock) -> None:
    """Weights may come from another actor all the while, so no lost session tells of it."""
    member.membership.advance([])
    member.membership.welcomed(Welcome(run_id="run", source="b"))
    member.hellos()
    member.hub.dealer.connected = False
    for _ in range(3):
        member.membership.advance([])
        clock.now += REPEAT_S
    assert not member.membership.serving and not member.hellos(), "a Hello would wait, and come twice"
    assert [node.stopped for node in member.nodes] == [True, False]
    member.hub.dealer.connected = True
    member.hub.connections += 1
    member.membership.advance([])
    assert [hello.direct for hello in member.hellos()] == [False]


def test_a_hub_that_is_away_and_one_that_refuses_the_connection_are_errors_of_a_member(
    member: Member, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise HubError("refuses the connection")

    member.membership.welcomed(Welcome(run_id="run", store="/proc/1/fd/1"))
    member.hub.dealer.connected = False
    member.membership.advance([])
    clock.now += TIMEOUT_S + 1.0
    with pytest.raises(HubError, match="not a member for 60 s, because the connection to the hub was lost"):
        member.membership.advance([])
    monkeypatch.setattr(member.hub.dealer, "check_refused", refused)
    with pytest.raises(HubError, match="refuses the connection"):
        member.membership.advance([])


def test_a_second_welcome_replaces_the_weight_receiver(member: Member) -> None:
    """The hub has answered two Hellos, and started two weight senders; the second one is the one that lives."""
    member.membership.welcomed(Welcome(run_id="run", session_port=1))
    member.membership.welcomed(Welcome(run_id="run", session_port=2))
    assert [node.stopped for node in member.nodes] == [True, False]
    assert member.nodes[1].addresses == [("", 2)]


def test_a_weight_receiver_that_ends_before_the_welcome_is_replaced(member: Member) -> None:
    member.membership.session_down("killed")
    assert [node.stopped for node in member.nodes] == [True, False]


def test_a_refusal_is_retried_after_growing_pauses(member: Member, clock: Clock, caplog) -> None:
    member.membership.advance([])
    for pause in [*BACKOFF_S, BACKOFF_S[-1]]:
        member.hellos()
        member.membership.refused(TAKEN)
        clock.now += pause - 0.01
        member.membership.advance([])
        assert not member.hellos()
        clock.now += 0.02
        member.membership.advance([])
        assert len(member.hellos()) == 1
    assert caplog.text.count("trying again for up to 60 s") == 1, "a line for each reason, not for each attempt"
    member.membership.welcomed(Welcome(run_id="run"))
    assert member.membership.serving


def test_a_final_refusal_ends_the_actor(member: Member) -> None:
    with pytest.raises(Refusal, match="hub memory: refused a: another tokenizer"):
        member.membership.refused(Refused(reason="another tokenizer", final=True))


@pytest.mark.parametrize("served_before", [False, True])
def test_it_gives_up_after_the_timeout(member: Member, clock: Clock, served_before: bool) -> None:
    if served_before:
        member.membership.welcomed(Welcome(run_id="run"))
        clock.now += 10 * TIMEOUT_S
        member.membership.lost("the session is down")
    for _ in range(int(TIMEOUT_S)):
        clock.now += 1.0
        member.membership.advance([])
    clock.now += 0.1
    with pytest.raises(HubError, match="hub memory: not a member for 60 s; check that the hub runs"):
        member.membership.advance([])


def test_the_error_after_the_timeout_names_the_last_refusal(member: Member, clock: Clock) -> None:
    with pytest.raises(HubError, match="not a member for 60 s, because it refused a: the name 'a' is taken"):
        for _ in itertools.count():
            clock.now += 1.0
            member.membership.refused(TAKEN)
            member.membership.advance([])


def test_an_actor_whose_sessions_always_fail_gives_up_after_growing_pauses(member: Member, clock: Clock) -> None:
    began, welcomes = clock.now, 0
    with pytest.raises(HubError, match="not a member for 60 s, because the session is down"):
        while clock.now < began + 10 * TIMEOUT_S:
            member.membership.advance([])
            if member.hellos():
                member.membership.welcomed(Welcome(run_id="run"))
                member.membership.lost("the session is down")
                welcomes += 1
            clock.now += 0.1
    assert welcomes < 20
    assert clock.now < began + TIMEOUT_S + 1


def test_a_session_that_lasts_is_no_failure_when_it_ends(member: Member, clock: Clock) -> None:
    for _ in range(10):
        member.membership.advance([])
        assert len(member.hellos()) == 1, "at once"
        member.membership.welcomed(Welcome(run_id="run"))
        clock.now += PROVEN_S + 1
        member.membership.lost("the session is down")


def test_a_short_session_in_which_weights_arrived_is_no_failure(
    member: Member, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that is killed again and again costs no actor."""
    for _ in range(30):
        member.membership.advance([])
        assert len(member.hellos()) == 1, "at once"
        member.membership.welcomed(Welcome(run_id="run"))
        announced = VersionAnnounced(version=1, digest="d", nbytes=1, published_at=0.0)
        monkeypatch.setattr(member.nodes[-1], "poll", lambda own=announced: [own])
        member.membership.node_events()
        clock.now += TIMEOUT_S / 10
        member.membership.lost("the session is down")


def test_only_the_first_run_is_its_run(member: Member) -> None:
    assert member.membership.welcomed(Welcome(run_id="run"))
    assert member.membership.welcomed(Welcome(run_id="run"))
    assert not member.membership.welcomed(Welcome(run_id="another"))


def test_the_store_of_another_actor_takes_the_place_of_a_session(member: Member, clock: Clock) -> None:
    file = StoreFile("/nowhere")
    manifest = StoreWriter(file.path).publish(3, [("w", torch.ones(4))])
    member.membership.welcomed(Welcome(run_id="run", store=file.path, source="b"))
    assert member.nodes[0].stopped, "nothing is pulled"
    (event,) = member.membership.node_events()
    assert event == VersionReceived(
        version=3,
        path=file.path,
        digest=manifest.digest,
        nbytes=manifest.nbytes,
        received=0,
        seconds=0.0,
        published_at=manifest.published_at,
    )
    assert member.membership.node_events() == []
    StoreWriter(file.path).publish(4, [("w", torch.zeros(4))])
    assert [event.version for event in member.membership.node_events()] == [4]
    file.close()
    (down,) = member.membership.node_events()
    assert isinstance(down, ReceiverDown) and file.path in down.reason
    member.membership.session_down(down.reason)
    member.hellos()
    member.membership.advance([])
    assert [hello.direct for hello in member.hellos()] == [False], "its weights had arrived"
    member.membership.welcomed(Welcome(run_id="run", session_host="h", session_port=7))
    assert len(member.nodes) == 2 and member.nodes[1].addresses == [("h", 7)]


def test_the_store_of_an_actor_that_dies_before_there_are_weights_is_no_reason_to_ask_the_hub(member: Member) -> None:
    """The hub names another one; it would have to serve all actors of the machine otherwise."""
    file = StoreFile("/nowhere")
    member.membership.welcomed(Welcome(run_id="run", store=file.path, source="b"))
    assert member.membership.node_events() == []
    file.close()
    (down,) = member.membership.node_events()
    assert isinstance(down, ReceiverDown)
    member.membership.session_down(down.reason)
    member.membership.advance([])
    assert not member.hellos()[-1].direct


def test_a_lost_connection_to_the_hub_is_no_fault_of_the_actor_that_serves(member: Member) -> None:
    member.membership.welcomed(Welcome(run_id="run", source="b"))
    member.hub.connections += 1
    member.membership.advance([])
    assert not member.hellos()[-1].direct


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/fd/0", "/proc/1/fd/../environ"])
def test_no_other_file_than_a_store_is_opened(member: Member, path: str) -> None:
    member.membership.welcomed(Welcome(run_id="run", source="b", store=path))
    (down,) = member.membership.node_events()
    assert isinstance(down, ReceiverDown) and f"must be at /proc/PID/fd/N, got '{path}'" in down.reason


def test_a_pipe_is_no_store(member: Member) -> None:
    read, write = os.pipe()
    member.membership.welcomed(Welcome(run_id="run", source="b", store=f"/proc/{os.getpid()}/fd/{read}"))
    (down,) = member.membership.node_events()
    assert isinstance(down, ReceiverDown)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("store", ["", "/nowhere"])
def test_an_actor_that_another_one_could_not_serve_asks_for_a_session_with_the_hub(
    member: Member, clock: Clock, store: str
) -> None:
    """From then on: the same would happen again."""
    member.membership.welcomed(Welcome(run_id="run", source="b", store=store))
    clock.now += 10 * PROVEN_S
    member.membership.session_down("cannot be reached")
    for _ in range(2):
        clock.now += REPEAT_S
        member.membership.advance([])
        assert member.hellos()[-1].direct
        member.membership.welcomed(Welcome(run_id="run"))
        member.membership.lost("the connection to the hub was lost")


def test_a_session_of_the_hub_that_ends_early_changes_no_source(member: Member) -> None:
    member.membership.welcomed(Welcome(run_id="run"))
    member.membership.session_down("gone")
    member.membership.advance([])
    assert not member.hellos()[-1].direct


def test_a_weight_receiver_that_ends_late_does_not_spoil_a_good_end(
    member: Member, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> None:
        raise DeadlineExceeded("weight receiver of a", "end after SIGKILL", 5.0)

    monkeypatch.setattr(member.nodes[0], "stop", stop)
    member.membership.close()
    assert "weight receiver of a" in caplog.text


def test_an_actor_that_gives_up_says_that_the_hub_is_of_another_release(member: Member, clock: Clock) -> None:
    member.hub.mismatch = "protocol: the other side uses version 99"
    clock.now += TIMEOUT_S + 1
    with pytest.raises(HubError, match="not a member for 60 s, because protocol: the other side uses version 99"):
        member.membership.advance([])
