"""What the hub's core is told of weights that the learner publishes on another machine."""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from sgpo_async.hub.events import Received
from sgpo_async.hub.learner_weights import LearnerWeights
from sgpo_async.session import ReceiverDown, VersionReceived
from sgpo_async.session.settings import Deltas
from sgpo_async.weights import StoreFile, StoreWriter
from sgpo_async.wire.records import Published

RANK_0 = b"rank-0"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Link:
    """Instead of a weight receiver: the test lets versions arrive."""

    made: ClassVar[list["Link"]] = []

    def __init__(self, name: str, *, store: str, deltas: str) -> None:
        self.name, self.store, self.address, self.secret, self.stopped = name, store, ("", 0), b"", False
        self.deltas = deltas
        self.events: list[object] = []
        Link.made.append(self)

    def connect(self, host: str, port: int, secret: bytes) -> None:
        self.address, self.secret = (host, port), secret

    def poll(self) -> list[object]:
        events, self.events = self.events, []
        return events

    def stop(self, deadline_s: float) -> None:
        assert deadline_s > 0
        self.stopped = True

    def arrive(self, version: int) -> None:
        StoreWriter(self.store).publish(version, [("w", torch.ones(3))])
        fields = {"digest": "", "nbytes": 12, "seconds": 0.1, "published_at": 0.0}
        self.events.append(VersionReceived(version=version, path=self.store, received=0, **fields))


@pytest.fixture
def store(tmp_path: Path) -> StoreFile:
    Link.made = []
    with closing(StoreFile(tmp_path)) as file:
        yield file


def offer(weights: LearnerWeights, version: int, port: int = 4000) -> Published | None:
    return weights.offered(RANK_0, Published(version=version, store=f"tcp://10.0.0.2:{port}", secret=b"%d" % port))


def test_a_version_on_this_machine_is_told_at_once(store: StoreFile) -> None:
    message = Published(version=3, store="/proc/1/fd/5")
    assert LearnerWeights(store, receiver=Link).offered(RANK_0, message) is message
    assert not Link.made


def test_a_hub_that_cannot_open_the_learners_store_says_so(store: StoreFile, caplog: pytest.LogCaptureFixture) -> None:
    """It was restarted in another container, where the path of the learner's machine means nothing."""
    assert not LearnerWeights(store, receiver=Link).use("/proc/0/fd/3")
    assert "weights at /proc/0/fd/3 cannot be opened here" in caplog.text and "learner.resume=true" in caplog.text


def test_a_version_elsewhere_is_told_when_the_store_holds_it(store: StoreFile) -> None:
    weights = LearnerWeights(store, receiver=Link)
    assert offer(weights, 0) is None and weights.events() == []
    (link,) = Link.made
    assert (link.store, link.address) == (store.path, ("10.0.0.2", 4000))
    link.arrive(0)
    assert weights.events() == [Received(RANK_0, Published(version=0, store=store.path))]
    assert offer(weights, 0) is None, "a repeated message"
    assert weights.events() == [Received(RANK_0, Published(version=0, store=store.path))]
    assert offer(weights, 1) is None and len(Link.made) == 1, "the link carries all versions"


def test_a_link_that_is_lost_is_renewed_by_the_next_message(store: StoreFile) -> None:
    weights = LearnerWeights(store, receiver=Link)
    offer(weights, 0)
    Link.made[0].events.append(ReceiverDown("the weight sender is gone"))
    assert weights.events() == []
    until(lambda: Link.made[0].stopped)
    assert offer(weights, 0, port=4001) is None
    assert Link.made[1].address == ("10.0.0.2", 4001) and Link.made[1].secret == b"4001"
    Link.made[1].arrive(0)
    assert len(weights.events()) == 1
    weights.close()
    until(lambda: Link.made[1].stopped)
    assert weights.events() == []


def test_a_learner_that_has_moved_gets_a_new_link(store: StoreFile) -> None:
    weights = LearnerWeights(store, receiver=Link)
    offer(weights, 0)
    offer(weights, 1, port=4001)
    until(lambda: Link.made[0].stopped)
    assert Link.made[1].address == ("10.0.0.2", 4001)


def test_a_weight_sender_that_starts_again_at_the_same_port_gets_a_new_link(store: StoreFile) -> None:
    """Its secret is another one."""
    weights = LearnerWeights(store, receiver=Link)
    for secret in (b"first", b"second"):
        weights.offered(RANK_0, Published(version=0, store="tcp://10.0.0.2:4000", secret=secret))
    assert [link.secret for link in Link.made] == [b"first", b"second"]
    until(lambda: Link.made[0].stopped)


@pytest.mark.parametrize("deltas", ["auto", "always", "never"])
def test_the_link_has_the_setting_of_differences(store: StoreFile, deltas: Deltas) -> None:
    offer(LearnerWeights(store, deltas=deltas, receiver=Link), 0)
    assert Link.made[0].deltas == deltas


def test_a_new_link_is_taken_also_if_the_store_has_the_version_already(store: StoreFile) -> None:
    """Rank 0 offers another weight sender before the hub notices the end of the first one."""
    weights = LearnerWeights(store, receiver=Link)
    offer(weights, 0)
    Link.made[0].arrive(0)
    assert len(weights.events()) == 1
    assert offer(weights, 0, port=4001) is None
    assert weights.events() == [Received(RANK_0, Published(version=0, store=store.path))]
    assert Link.made[1].address == ("10.0.0.2", 4001)


def test_every_version_is_told_in_order_as_soon_as_the_store_and_its_message_are_here(store: StoreFile) -> None:
    """Also one that the link has overwritten before the hub looked: an actor may have it."""
    weights = LearnerWeights(store, receiver=Link)
    offer(weights, 0)
    Link.made[0].arrive(0)
    Link.made[0].arrive(1)
    assert [event.message.version for event in weights.events()] == [0], "the digest of 1 is still on its way"
    offer(weights, 1)
    offer(weights, 3)
    offer(weights, 2)
    assert [event.message.version for event in weights.events()] == [1]
    Link.made[0].arrive(3)
    assert [event.message.version for event in weights.events()] == [2, 3]
    assert weights.events() == []


@pytest.mark.parametrize(
    "address", ["tcp://", "tcp://host", "tcp://host:x", "tcp://:4000", "tcp://h:0", "tcp://h:99999"]
)
def test_a_malformed_address_is_left_to_the_core(store: StoreFile, address: str) -> None:
    message = Published(version=0, store=address)
    assert LearnerWeights(store, receiver=Link).offered(RANK_0, message) is message and not Link.made


def test_a_receiver_that_cannot_be_started_is_tried_again(store: StoreFile) -> None:
    failures = [OSError("no more processes")]

    def receiver(name: str, **settings: str) -> Link:
        if failures:
            raise failures.pop()
        return Link(name, **settings)

    weights = LearnerWeights(store, receiver=receiver)
    assert offer(weights, 0) is None and not Link.made
    assert offer(weights, 0) is None and len(Link.made) == 1


def test_an_ipv6_address_is_read(store: StoreFile) -> None:
    LearnerWeights(store, receiver=Link).offered(RANK_0, Published(version=0, store="tcp://[fd00::2]:4000"))
    assert Link.made[0].address == ("fd00::2", 4000)
