"""The actor's side of `session.rpc_server`: requests to the weight sender as futures.

    any thread      request ──▶ command to the weight receiver ──Torch RPC──▶ weight sender
    actor's loop    WeightReceiver.poll ──▶ complete, expire, end ──▶ future

The thread that waits for a future must not be the thread that polls. Every future completes: by its response, by its
timeout, or by the end of the session.
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

_GRACE_S = 5.0  # added to a timeout here, so that the weight sender's own, more precise error arrives first


@dataclass(frozen=True)
class _Pending:
    future: Future[Any]
    read: Callable[[Any], Any]
    subject: str
    deadline: float  # monotonic


class RpcClient:
    """The pending requests of one actor; `send` passes a command to the weight receiver process."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._end_reason = ""  # not empty: the session is over, requests fail immediately

    def request(
        self, method: str, *, seconds: float, read: Callable[[Any], Any] = lambda value: value, **arguments: Any
    ) -> Future[Any]:
        """Send a request that fails after `seconds`; `read` converts the response (JSON types) to the result."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # so that `cancel` has no effect
        subject = f"{arguments.get('group') or arguments.get('version')}: {method}"
        with self._lock:
            if self._end_reason:
                future.set_exception(SessionError(f"{subject}: {self._end_reason}"))
                return future
            id = next(self._ids)
            self._pending[id] = _Pending(future, read, subject, time.monotonic() + seconds + _GRACE_S)
        self._send({"id": id, "method": method, "seconds": seconds, "arguments": arguments})
        return future

    def complete(self, id: int, value: Any, error: tuple[str, str] | None) -> None:
        """Complete the future of a request. A response that comes after the timeout is ignored."""
        with self._lock:
            pending = self._pending.pop(id, None)
        if pending is None:
            return
        if error:
            kind, message = error
            pending.future.set_exception(getattr(errors, kind)(message))
        else:
            pending.future.set_result(pending.read(value))

    def expire(self) -> None:
        """Fail the requests whose deadline has passed."""
        now = time.monotonic()
        with self._lock:
            late = [(id, pending) for id, pending in self._pending.items() if pending.deadline < now]
        for id, pending in late:
            message = f"{pending.subject}: the weight sender did not respond in time"
            self.complete(id, None, ("SessionError", message))

    def end(self, reason: str) -> None:
        """Fail all pending requests, and every later one, because the session is over."""
        with self._lock:
            self._end_reason = reason
            pending_requests = dict(self._pending)
        for id, pending in pending_requests.items():
            self.complete(id, None, ("SessionError", f"{pending.subject}: {reason}"))
