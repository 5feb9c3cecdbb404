"""The connection of one learner rank to the hub.

    main thread ── outgoing ──▶ ┌ hub thread: owns the mailbox   ┐ ──▶ hub
    publish thread ──┘          │ waits POLL_S for messages, and │
    main thread ◀── incoming ── └ sends a Heartbeat when due     ┘ ◀── hub

Only the hub thread uses the socket. It sends heartbeats while the main thread is busy with a long step. The main thread
waits on `incoming`, each time with a deadline. Evaluation results that arrive meanwhile are kept for later.

A broken connection, also that of a hub that is killed and started again, loses messages. So a request is repeated every
REPEAT_S, and at once when the connection is back, until it is answered; the hub gives the same answer to a repeated
request. While the hub has no batch or evaluation yet, it says how long ago the run made progress (Pending), and the
timeout counts from then.

What the hub does not answer is sent once more whenever the connection is back: the newest publications, and the
evaluations without a result.

An interrupted hub sends Stop, and still answers until the learner has written a checkpoint, or for LAST_ANSWERS_S.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from sgpo_async.errors import DeadlineExceeded, HubError
from sgpo_async.wire.records import (
    BatchRequest,
    Commit,
    Committed,
    Evaluate,
    Evaluated,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    NoBatch,
    Pending,
    Published,
    Refused,
    Restore,
    Restored,
    Shard,
    Snapshot,
    SnapshotRequest,
    Status,
    StatusRequest,
    Stop,
    Welcome,
)

log = logging.getLogger(__name__)

POLL_S = 0.005
ANSWER_S = 120.0  # timeout of requests that the hub answers immediately, unless it has to be started again first
LAST_ANSWERS_S = 35.0  # longer than `hub.core.CHECKPOINT_GRACE_S`
FINISH_S = 30.0
REPEAT_S = 10.0
LOOK_S = 0.2  # how often a rank that waits looks whether it has to stop
CLOSE_S = 5.0
PUBLICATIONS = 8  # so many are sent again after a lost connection

Answer = TypeVar("Answer")


class Mail(Protocol):
    """The part of `transport.Mailbox` that the client uses."""

    @property
    def connections(self) -> int:
        """How often it has connected to the hub."""
        ...

    def send(self, message: Message) -> bool:
        """Queue a message; False if the queue is full."""
        ...

    def receive(self, timeout_s: float) -> list[Message]:
        """Return the messages that arrive within `timeout_s`."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Send the queued messages, then close."""
        ...


class HubClient:
    """The client of one learner rank. `stopping()` returns why the rank has to stop, or "".

    Every request raises HubError if the hub refuses it or has ended, DeadlineExceeded if it does not answer in time.
    """

    def __init__(self, mail: Mail, *, name: str, heartbeat_s: float, stopping: Callable[[], str] = lambda: "") -> None:
        self.name = name
        self.ended = ""  # why the hub ends the run; empty while it does not
        self._answers_until = math.inf
        self._stopping = stopping
        self.evaluations: deque[Evaluated] = deque()  # results that `take_evaluations` has not yet returned
        self._mail, self._heartbeat_s = mail, heartbeat_s
        self._outgoing: deque[Message] = deque()
        self._incoming: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._request: Message | None = None  # the request that the main thread waits for
        # The newest ones, oldest first. Actors may still serve one that was lost with the connection.
        self._publications: deque[Published] = deque(maxlen=PUBLICATIONS)
        self._publishing = threading.Lock()  # several threads publish, and one sends again
        self._evaluating: dict[int, Evaluate] = {}  # requests without a result, by version
        self._evaluated: set[int] = set()  # versions whose results have arrived; some arrive twice
        self._connections = mail.connections
        self._joined = self._closing = False
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)
        self._thread.start()

    # ---- requests of every rank

    def join(self, hello: Hello) -> Welcome:
        """Register this rank with the hub."""
        welcome = self._ask(lambda: hello, Welcome, "Welcome", ANSWER_S)
        self._joined = True
        return welcome

    def batch(self, step: int, part: int = 0, *, timeout_s: float) -> Shard | NoBatch:
        """Wait for this rank's share of a part of the batch of `step`, or for NoBatch if all ranks have to stop.

        It waits at most `timeout_s` without progress of the run.
        """
        return self._ask(
            lambda: BatchRequest(step=step, part=part, stopping=self._stopping()),
            cast("type[Shard | NoBatch]", (Shard, NoBatch)),  # as `isinstance` takes them
            f"batch of step {step} (check that actors are running and fast enough)",
            timeout_s,
            lambda answer: answer.step == step and getattr(answer, "part", part) == part,
        )

    def leave(self, reason: str = "") -> None:
        """Send the queued messages and Goodbye, then close the connection."""
        self._outgoing.append(Goodbye(reason=reason))
        self._closing = True
        self._thread.join(CLOSE_S)

    # ---- requests of rank 0

    def commit(self, step: int) -> dict[str, Any]:
        """Report that the update on the batch of `step` is done; return the hub's status."""
        what = f"Committed of step {step}"
        request = Commit(step=step)
        return self._ask(lambda: request, Committed, what, ANSWER_S, lambda done: done.step == step).status

    def published(self, version: int, digest: int, canary: np.ndarray | None, store: str, secret: bytes) -> None:
        """Report that the store at `store` holds `version` completely. May be called from any thread.

        Args:
            version: newer than all reported ones.
            digest: short digest of the version.
            canary: the learner's score of the canary, if it was measured.
            store: its path, or where the hub has to pull the version.
            secret: that of the link, if the hub has to pull the version.
        """
        with self._publishing:
            self._publications.append(
                Published(version=version, digest=digest, canary=canary, store=store, secret=secret)
            )
            self._outgoing.append(self._publications[-1])

    def moved(self, store: str, secret: bytes) -> None:
        """Report that the versions are at `store` from now on. May be called from any thread."""
        with self._publishing:
            if self._publications:  # else the first one brings this news
                self._publications[-1] = replace(self._publications[-1], store=store, secret=secret)
                self._outgoing.append(self._publications[-1])

    def evaluate(self, version: int) -> None:
        """Request an evaluation of `version`; the result arrives later in `evaluations`."""
        self._evaluating[version] = Evaluate(version=version)
        self._outgoing.append(self._evaluating[version])

    def take_evaluations(
        self, *, until: int | None = None, timeout_s: float = 0.0, meanwhile: Callable[[], object] = lambda: None
    ) -> list[Evaluated]:
        """Return and remove the results that have arrived; with `until`, wait for the result of this version.

        The wait lasts at most `timeout_s` without progress of the run, and ends if this rank or the run has to stop;
        `meanwhile` is called every REPEAT_S.
        """
        deadline, repeat_at, repeat_s = time.monotonic() + timeout_s, -math.inf, min(REPEAT_S, timeout_s / 4)
        self._drain()
        while until is not None and not any(result.version == until for result in self.evaluations):
            if self.ended or self._stopping():
                break
            if (now := time.monotonic()) >= deadline:
                raise DeadlineExceeded(self.name, f"evaluation of version {until} from the hub", timeout_s)
            if now >= repeat_at:
                self._outgoing.append(Evaluate(version=until))
                repeat_at = now + repeat_s
                meanwhile()
            if isinstance(received := self._next(min(now + LOOK_S, deadline)), Pending):
                deadline = max(deadline, time.monotonic() + timeout_s - received.idle_s)
        taken = list(self.evaluations)
        self.evaluations.clear()
        return taken

    def snapshot(self, step: int) -> bytes:
        """Request the hub's state after `step` commits, for a checkpoint."""
        request = SnapshotRequest(step=step)
        return self._ask(lambda: request, Snapshot, "Snapshot", ANSWER_S, lambda answer: answer.step == step).state

    def restore(self, state: bytes) -> int:
        """Restore the hub to a checkpoint's state; return the version that the weights now have."""
        request = Restore(state=state, id=uuid.uuid4().hex)
        return self._ask(lambda: request, Restored, "Restored", ANSWER_S).version

    def status(self) -> dict[str, Any]:
        """Request the status of the run."""
        return self._ask(StatusRequest, Status, "Status", ANSWER_S).status

    def finish(self) -> None:
        """Report that the run is finished. A hub that does not answer costs nothing but its own end."""
        try:
            self._ask(Finish, Stop, "Stop", FINISH_S)
        except DeadlineExceeded as error:
            log.warning("%s; end it by hand if it still runs", error)

    # ---- main thread: waiting

    def _ask(
        self,
        request: Callable[[], Message],
        kind: type[Answer],
        what: str,
        timeout_s: float,
        matches: Callable[[Answer], bool] = lambda _: True,
    ) -> Answer:
        """Send the request, also when it changes and every REPEAT_S, until a matching answer of `kind` arrives."""
        deadline, repeat_at = time.monotonic() + timeout_s, -math.inf
        repeat_s = min(REPEAT_S, timeout_s / 4)  # the answer Pending comes to a repeated request only
        self._drain()
        try:
            while (now := time.monotonic()) < min(deadline, self._answers_until):
                message = request()
                if message != self._request or now >= repeat_at:
                    self._outgoing.append(message)
                    self._request, repeat_at = message, now + repeat_s
                received = self._next(min(now + LOOK_S, deadline))
                if isinstance(received, Pending):
                    deadline = max(deadline, time.monotonic() + timeout_s - received.idle_s)
                elif isinstance(received, kind) and matches(received):
                    return received
        finally:
            self._request = None
        if self.ended and time.monotonic() < deadline:
            raise HubError(f"{self.name}: the hub has ended without {what}: {self.ended}")
        raise DeadlineExceeded(self.name, f"{what} from the hub", timeout_s)

    def _drain(self) -> None:
        """Discard late answers to earlier requests; keep evaluation results and raise refusals."""
        while not self._incoming.empty():
            self._take(self._incoming.get())

    def _next(self, deadline: float) -> Message | None:
        """Return the next message, or None if none arrives before the deadline."""
        try:
            return self._take(self._incoming.get(timeout=max(deadline - time.monotonic(), 0)))
        except queue.Empty:
            return None

    def _take(self, message: Message | Exception) -> Message:
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Refused):
            raise HubError(f"{self.name}: the hub refused the request: {message.reason}")
        if isinstance(message, Stop):
            self.ended, self._answers_until = message.reason, time.monotonic() + LAST_ANSWERS_S
        if isinstance(message, Evaluated) and message.version not in self._evaluated:
            self._evaluated.add(message.version)
            self._evaluating.pop(message.version, None)
            self.evaluations.append(message)
        return message

    # ---- hub thread

    def _serve(self) -> None:
        heartbeat_due = 0.0
        try:
            while not (self._closing and not self._outgoing):
                if self._joined and time.monotonic() >= heartbeat_due:
                    heartbeat_due = time.monotonic() + self._heartbeat_s
                    self._mail.send(Heartbeat(state="training"))
                self._resend_after_reconnection()
                self._flush()
                for message in self._mail.receive(POLL_S):
                    self._incoming.put(message)
        except Exception as error:  # the main thread raises it at its next wait
            self._incoming.put(error)
        finally:
            self._mail.close(CLOSE_S)

    def _resend_after_reconnection(self) -> None:
        """Put everything into the queue that may have been lost with the last connection."""
        if self._mail.connections == self._connections:
            return
        self._connections = self._mail.connections
        if not self._joined:
            return  # the request to join is repeated by itself
        log.warning("%s: connected to the hub again", self.name)
        with self._publishing:
            newest = self._publications[-1] if self._publications else None
            # All versions are where the newest one is.
            published = [replace(one, store=newest.store, secret=newest.secret) for one in self._publications if newest]
        lost = [*published, *list(self._evaluating.values()), self._request]
        self._outgoing.extend(message for message in lost if message is not None)

    def _flush(self) -> None:
        while self._outgoing:
            if not self._mail.send(self._outgoing.popleft()):
                raise HubError(f"{self.name}: the hub accepts no messages; check that it runs and can be reached")
