"""The functions that the two processes of a world call on each other; each runs in an RPC thread of the callee.

    weight receiver ──▶ weight sender     manifest()  bucket(version, index, base)  submit(request)
    weight sender   ──▶ weight receiver   announce(version)  respond(response)

The objects that they work on are in `callee`, which is set before the world exists. All of them return at once but
`bucket`, which waits a moment for a bucket that is still on its way to this node. That a version was superseded is a
normal answer and no exception, of which Torch RPC would print a traceback. The heartbeats between the two processes are
in `session.rpc_world` and `session.socket_world`.
"""

from __future__ import annotations

import queue
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sgpo_async.errors import Superseded
from sgpo_async.session.messages import Announced, Request, Response
from sgpo_async.weights.reader import StoreReader

if TYPE_CHECKING:
    from sgpo_async.session.rpc_server import RpcServer


ARRIVAL_S = 1.0  # how long `bucket` waits; well below the deadline of a call
_POLL_S = 0.002
SUPERSEDED = "superseded"
ARRIVING = "arriving"


@dataclass
class Callee:
    """The objects of this process that the calls work on."""

    store: StoreReader | None = None  # weight sender: what it serves
    server: RpcServer | None = None  # weight sender
    inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)  # weight receiver: of its main thread


callee = Callee()
# `bucket` makes tensors of read-only memory, which this process only sends. The filter is set once and not around each
# call, because filters belong to the whole process and `bucket` runs in several threads.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def manifest() -> bytes | None:
    """Return the encoded manifest of the newest version, or None if it was superseded while it was read."""
    assert callee.store is not None
    try:
        return callee.store.encoded_manifest()
    except Superseded:
        return None


def bucket(version: int, index: int, base: int | None) -> tuple[torch.Tensor, bool] | str:
    """Return the bytes of one bucket, [n] uint8, and whether they are its difference to version `base`.

    SUPERSEDED if the store no longer holds the version, ARRIVING if it does not hold this bucket of it yet.
    """
    assert callee.store is not None
    deadline = time.monotonic() + ARRIVAL_S
    try:
        while (found := callee.store.bucket_or_delta(version, index, base)) is None:
            if time.monotonic() > deadline:
                return ARRIVING
            time.sleep(_POLL_S)
    except Superseded:
        return SUPERSEDED
    data, is_delta = found
    return torch.frombuffer(data, dtype=torch.uint8), is_delta


def submit(request: Request) -> None:
    """Start to process `request`; the response comes back by a separate call of `respond`."""
    assert callee.server is not None
    callee.server.submit(request)


def announce(version: int) -> None:
    """Report that the learner has published a new version."""
    callee.inbox.put(Announced(version))


def respond(response: Response) -> None:
    """Deliver the response to an earlier request."""
    callee.inbox.put(response)


FROM_PEER = (manifest, bucket, submit, announce, respond, Request, Response)
"""The functions and classes that may arrive in a message of the peer."""
