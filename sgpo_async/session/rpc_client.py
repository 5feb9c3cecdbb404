"""The actor's side of `session.rpc_server`: questions to its link as futures.

    any thread      ask ──▶ command to the node process ──Torch RPC──▶ link
    actor's loop    WeightReceiver.poll ──▶ settle, expire, end ──▶ future

Whoever waits for a future must not be the thread that polls. A future always ends: by its answer, its deadline,
or the end of the session.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sgpo_async import errors
from sgpo_async.errors import SessionError

_GRACE_S = 5.0  # for an answer to arrive; by then the link has found out itself


@dataclass(frozen=True)
class _Pending:
    future: Future[Any]
    read: Callable[[Any], Any]
    subject: str
    expires: float  # monotonic


class RpcClient:
    """RpcClient under way; `send` takes a command for the node process."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._over = ""  # why no answer can come any more

    def ask(
        self, what: str, *, seconds: float, read: Callable[[Any], Any] = lambda value: value, **arguments: Any
    ) -> Future[Any]:
        """Ask something that has to be answered within `seconds`; `read` makes the result of a value of JSON types."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # nobody can cancel it
        subject = f"{arguments.get('group') or arguments.get('version')}: {what}"
        with self._lock:
            if self._over:
                future.set_exception(SessionError(f"{subject}: {self._over}"))
                return future
            number = next(self._ids)
            self._pending[number] = _Pending(future, read, subject, time.monotonic() + seconds + _GRACE_S)
        self._send({"id": number, "what": what, "seconds": seconds, "arguments": arguments})
        return future

    def settle(self, number: int, value: Any, error: tuple[str, str] | None) -> None:
        """An answer; one that comes after its deadline is of no use."""
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            return
        if error:
            kind, message = error
            pending.future.set_exception(getattr(errors, kind)(message))
        else:
            pending.future.set_result(pending.read(value))

    def expire(self) -> None:
        """Fail what has no answer in time."""
        now = time.monotonic()
        with self._lock:
            late = [(number, p) for number, p in self._pending.items() if p.expires < now]
        for number, pending in late:
            self.settle(number, None, ("SessionError", f"{pending.subject}: no answer from the link"))

    def end(self, reason: str) -> None:
        """The session is over."""
        with self._lock:
            self._over = reason
            open_ones = dict(self._pending)
        for number, pending in open_ones.items():
            self.settle(number, None, ("SessionError", f"{pending.subject}: {reason}"))
