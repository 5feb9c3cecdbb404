"""Where a learner publishes, and the weight sender that it keeps for a hub on another machine."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner import remote_store
from sgpo_async.learner.remote_store import RemoteStore, open_store
from sgpo_async.learner.share_group import Store
from sgpo_async.session import SenderDown, SenderUp
from sgpo_async.weights import Manifest, StoreFile, StoreReader, StoreWriter
from sgpo_async.weights.shares import layout
from sgpo_async.weights.store_file import machine
from sgpo_async.wire.records import Welcome

PATIENCE_S = 60.0


class Sender:
    """Instead of a weight sender: the test says what happens to it."""

    made: list["Sender"] = []  # noqa: RUF012
    refused = 0  # starts that fail

    def __init__(self, store: str, name: str, host: str) -> None:
        if Sender.refused:
            Sender.refused -= 1
            raise OSError("no more processes")
        self.events: list[object] = [SenderUp(4000 + len(Sender.made), b"secret %d" % len(Sender.made))]
        self.late = False
        Sender.made.append(self)

    def poll(self) -> list[object]:
        events, self.events = self.events, []
        return events

    def stop(self) -> None:
        if self.late:
            raise DeadlineExceeded("weight sender", "end after SIGKILL", 5.0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RemoteStore, list[tuple[str, bytes]]]]:
    monkeypatch.setattr(remote_store, "AGAIN_S", 0.01)
    Sender.made, Sender.refused = [], 0
    told: list[tuple[str, bytes]] = []
    file = StoreFile(tmp_path)
    own = RemoteStore(file, "fd00::2", lambda *contact: told.append(contact), sender=Sender)
    with closing(own):
        yield own, told


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def publish(own: Store, version: int) -> None:
    tensors = layout([("w", torch.float32, (3,))])
    own.begin(version, tensors)
    own.commit(Manifest(version, "0" * 32, 0.0, 64, tensors, ()))


def test_a_hub_on_this_machine_has_its_own_store_written(tmp_path: Path) -> None:
    file = StoreFile(tmp_path)
    welcome = Welcome(store=file.path, machine=machine())
    own = open_store(welcome, tmp_path, "tcp://127.0.0.1:1", lambda *_: None, nbytes=12)
    assert isinstance(own, StoreWriter)
    publish(own, 0)
    assert StoreReader(file.path).version() == 0


@pytest.mark.parametrize("hub", ["tcp://127.0.0.1:5757", "tcp://[::1]:5757"])
@pytest.mark.parametrize("welcome", [Welcome(store="/proc/1/fd/3", machine="another"), Welcome(store="/no/such/file")])
def test_another_hub_pulls_from_a_store_here(tmp_path: Path, hub: str, welcome: Welcome) -> None:
    own = open_store(welcome, tmp_path, hub, lambda *_: None, nbytes=12)
    assert isinstance(own, RemoteStore)
    own.close()


def test_versions_that_do_not_fit_into_memory_are_on_disk(tmp_path: Path) -> None:
    own = open_store(Welcome(), tmp_path, "tcp://127.0.0.1:1", lambda *_: None, nbytes=2**60)
    assert isinstance(own, RemoteStore) and not own._file.in_memory
    own.close()


def test_the_address_of_every_weight_sender_after_the_first_is_told(store: tuple) -> None:
    own, told = store
    publish(own, 3)
    assert own.contact == ("tcp://[fd00::2]:4000", b"secret 0") and told == []
    publish(own, 4)
    Sender.made[0].events.append(SenderDown("the hub is gone"))
    until(lambda: told == [("tcp://[fd00::2]:4001", b"secret 1")])


def test_a_weight_sender_that_cannot_be_started_or_ends_late_is_tried_again(store: tuple) -> None:
    own, told = store
    publish(own, 0)
    assert own.contact
    Sender.made[0].late, Sender.refused = True, 2
    Sender.made[0].events.append(SenderDown("the hub is gone"))
    until(lambda: told == [("tcp://[fd00::2]:4001", b"secret 1")])
