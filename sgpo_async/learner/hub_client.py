"""One rank's conversation with the hub.

    main thread ── outgoing ──▶ ┌ hub thread: owns the mailbox   ┐ ──▶ hub
    publish thread ──┘          │ waits POLL_S for messages, and │
    main thread ◀── incoming ── └ sends a Heartbeat when due     ┘ ◀── hub

Only the hub thread touches the socket. It beats while the main thread is busy with a long step; the main thread
waits on `incoming`, each time with a deadline. What it did not wait for (an evaluation's result) is kept.

A question is repeated every AGAIN_S until it is answered, since a connection that broke takes messages with it. The
hub answers repetitions alike, but for Restore: each would begin another past, so it is asked once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

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
    Published,
    Refused,
    Restore,
    Restored,
    Shard,
    Snapshot,
    SnapshotRequest,
    Status,
    StatusRequest,
    Welcome,
)

POLL_S = 0.005
ANSWER_S = 60.0  # for what the hub answers at once
AGAIN_S = 10.0
CLOSE_S = 5.0

Answer = TypeVar("Answer")


class Mail(Protocol):
    """What is needed of `transport.Mailbox`."""

    def send(self, message: Message) -> bool:
        """Queue a message; False if the queue is full."""
        ...

    def receive(self, timeout_s: float) -> list[Message]:
        """What has arrived within `timeout_s`."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Let queued messages leave, then close."""
        ...


class HubClient:
    """A learner rank as the hub sees it. Every call raises HubError if the hub refuses, DeadlineExceeded if silent."""

    def __init__(self, mail: Mail, *, name: str, heartbeat_s: float) -> None:
        self.name = name
        self.evaluations: deque[Evaluated] = deque()  # results not yet taken
        self._mail, self._heartbeat_s = mail, heartbeat_s
        self._outgoing: deque[Message] = deque()
        self._incoming: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._joined = self._closing = False
        self._thread = threading.Thread(target=self._serve, name="hub", daemon=True)
        self._thread.start()

    # ---- what every rank says

    def join(self, hello: Hello) -> Welcome:
        """Become a member."""
        welcome = self._ask(hello, Welcome, "Welcome", ANSWER_S)
        self._joined = True
        return welcome

    def batch(self, step: int, *, timeout_s: float) -> Shard:
        """This rank's part of the batch of `step`, once there is one."""
        what = f"batch of step {step} (are there actors, and do they keep up?)"
        return self._ask(BatchRequest(step=step), Shard, what, timeout_s, lambda shard: shard.step == step)

    def leave(self, reason: str = "") -> None:
        """Say goodbye and close; what was queued leaves first."""
        self._outgoing.append(Goodbye(reason=reason))
        self._closing = True
        self._thread.join(CLOSE_S)

    # ---- what rank 0 says

    def commit(self, step: int) -> dict[str, Any]:
        """The update on the batch of `step` is done; returns the hub's status."""
        what = f"Committed of step {step}"
        return self._ask(Commit(step=step), Committed, what, ANSWER_S, lambda done: done.step == step).status

    def published(self, version: int) -> None:
        """`version` stands whole in the store. May be called from any thread."""
        self._outgoing.append(Published(version=version))

    def evaluate(self, version: int) -> None:
        """Ask for pass rates of `version`; the result comes to `evaluations` in its time."""
        self._outgoing.append(Evaluate(version=version))

    def take_evaluations(self, *, until: int | None = None, timeout_s: float = 0.0) -> list[Evaluated]:
        """Results that have come in; with `until`, waits for that of this version."""
        deadline = time.monotonic() + timeout_s
        self._drain()
        while until is not None and not any(result.version == until for result in self.evaluations):
            if self._next(deadline) is None:
                raise DeadlineExceeded(self.name, f"evaluation of version {until} from the hub", timeout_s)
        taken = list(self.evaluations)
        self.evaluations.clear()
        return taken

    def snapshot(self, step: int) -> bytes:
        """The hub's state after `step` commits, for a checkpoint."""
        request = SnapshotRequest(step=step)
        return self._ask(request, Snapshot, "Snapshot", ANSWER_S, lambda answer: answer.step == step).state

    def restore(self, state: bytes) -> int:
        """Take the hub back to a checkpoint's state; returns the version that the weights now carry."""
        return self._ask(Restore(state=state), Restored, "Restored", ANSWER_S).version

    def status(self) -> dict[str, Any]:
        """How the run stands."""
        return self._ask(StatusRequest(), Status, "Status", ANSWER_S).status

    def finish(self) -> None:
        """The run is over."""
        self._outgoing.append(Finish())

    # ---- main thread: waiting

    def _ask(
        self,
        message: Message,
        kind: type[Answer],
        what: str,
        timeout_s: float,
        fits: Callable[[Answer], bool] = lambda _: True,
    ) -> Answer:
        deadline = time.monotonic() + timeout_s
        again_s = timeout_s if isinstance(message, Restore) else AGAIN_S
        self._drain()
        while (now := time.monotonic()) < deadline:
            self._outgoing.append(message)
            while received := self._next(min(now + again_s, deadline)):
                if isinstance(received, kind) and fits(received):
                    return received
        raise DeadlineExceeded(self.name, f"{what} from the hub", timeout_s)

    def _drain(self) -> None:
        """Answers to questions of the past are of no use; results and refusals are."""
        while not self._incoming.empty():
            self._take(self._incoming.get())

    def _next(self, deadline: float) -> Message | None:
        """What comes next; None if nothing comes in time."""
        try:
            return self._take(self._incoming.get(timeout=max(deadline - time.monotonic(), 0)))
        except queue.Empty:
            return None

    def _take(self, message: Message | Exception) -> Message:
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Refused):
            raise HubError(f"{self.name}: the hub refuses: {message.reason}")
        if isinstance(message, Evaluated):
            self.evaluations.append(message)
        return message

    # ---- hub thread

    def _serve(self) -> None:
        beat = 0.0
        try:
            while not (self._closing and not self._outgoing):
                if self._joined and time.monotonic() >= beat:
                    beat = time.monotonic() + self._heartbeat_s
                    self._mail.send(Heartbeat(state="training"))
                self._flush()
                for message in self._mail.receive(POLL_S):
                    self._incoming.put(message)
        except Exception as error:  # raised in the main thread, at its next wait
            self._incoming.put(error)
        finally:
            self._mail.close(CLOSE_S)

    def _flush(self) -> None:
        while self._outgoing:
            if not self._mail.send(self._outgoing.popleft()):
                raise HubError(f"{self.name}: the hub takes no messages: it is stopped, or cut off")
