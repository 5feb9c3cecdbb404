"""The functions that the two members of a world call on each other; each runs in an RPC thread of the callee.

    node ──▶ link     manifest()  bucket(version, index)  ask(question)
    link ──▶ node     announce(version)  control(word)    answer(reply)

They find what they work on in this module, set before the world exists, and return at once. None stands for
"superseded": an expected answer, not an exception that would be printed on the way. Signs of life are the world's own,
`session.rpc_world.beat`.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sgpo_async.errors import Superseded
from sgpo_async.session.messages import Announced, Answer, Ask, Control
from sgpo_async.weights.reader import StoreReader

if TYPE_CHECKING:
    from sgpo_async.session.rpc_server import RpcServer


@dataclass
class Callee:
    """What the calls of this process work on."""

    store: StoreReader | None = None  # link
    server: RpcServer | None = None  # link
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
    assert callee.server is not None
    callee.server.take(question)


def announce(version: int) -> None:
    """A new version is there."""
    callee.inbox.put(Announced(version))


def control(word: str) -> None:
    """A word for the actor."""
    callee.inbox.put(Control(word))


def answer(reply: Answer) -> None:
    """What came of something that was asked."""
    callee.inbox.put(reply)
