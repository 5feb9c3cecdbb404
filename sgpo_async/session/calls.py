"""The functions that the two members of a world call on each other; each runs in an RPC thread of the callee.

    node ──▶ link     manifest()  bucket(version, index)  beat(seconds)  ask(question)
    link ──▶ node     announce(version)  control(word)    beat(seconds)  answer(reply)

They find what they work on in this module, set before the world exists, and return at once. None stands for
"superseded": an expected answer, not an exception that would be printed on the way.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sgpo_async.errors import Superseded
from sgpo_async.weights.reader import StoreReader

if TYPE_CHECKING:
    from sgpo_async.session.desk import Desk


@dataclass
class Announced:
    """A version is there to be pulled."""

    version: int


@dataclass
class Control:
    """A word for the actor."""

    word: str


@dataclass
class Ask:
    """Something that the actor asks of its link and that may take a while (see `session.desk`)."""

    id: int
    what: str
    seconds: float  # until it fails
    arguments: dict[str, Any]


@dataclass
class Answer:
    """What came of an `Ask`: a value of JSON types, or an error as (class in `sgpo_async.errors`, message)."""

    id: int
    value: Any = None
    error: tuple[str, str] | None = None


@dataclass
class Callee:
    """What the calls of this process work on."""

    store: StoreReader | None = None  # link
    desk: Desk | None = None  # link
    inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)  # node: of its main thread


callee = Callee()


def manifest() -> bytes | None:
    """Encoded manifest of the newest version."""
    assert callee.store is not None
    try:
        return callee.store.encoded_manifest()
    except Superseded:
        return None


def bucket(version: int, index: int) -> torch.Tensor | None:
    """Bytes of one bucket, [nbytes] uint8."""
    assert callee.store is not None
    try:
        return torch.frombuffer(callee.store.bucket(version, index), dtype=torch.uint8)
    except Superseded:
        return None


def ask(question: Ask) -> None:
    """Begin with `question`; the answer is a call of its own."""
    assert callee.desk is not None
    callee.desk.take(question)


def announce(version: int) -> None:
    """A new version is there."""
    callee.inbox.put(Announced(version))


def control(word: str) -> None:
    """A word for the actor."""
    callee.inbox.put(Control(word))


def answer(reply: Answer) -> None:
    """What came of something that was asked."""
    callee.inbox.put(reply)


def beat(seconds: float) -> None:
    """Answer after `seconds`. So a call is always under way, and fails at once when the peer is gone."""
    time.sleep(seconds)
