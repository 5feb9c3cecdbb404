"""One session of an actor: leases in, rollouts out, weights in flight. One thread, one loop.

    hub ── Lease, Ack, Stop ──▶ receive ─▶ admit ─▶ generate ─▶ publish ── Rollout, Ready, Heartbeat ──▶ hub
    weight sender ── Torch RPC ──▶ weight receiver ── version, path ──▶ refresh ─▶ engine.load

The loop waits in `receive` while the engine is idle, and in `generate` while an engine that lives elsewhere works; both
waits are short. A lease waits in `admit` until the engine holds a version that the lease admits. A rollout waits in the
sender until the hub acknowledges it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sgpo_async.config import Run
from sgpo_async.engines.base import Engine, Weights
from sgpo_async.errors import EngineError, SessionError, Superseded, WeightsError
from sgpo_async.rollout.sampler import RolloutSampler, Unservable
from sgpo_async.session import (
    ReceiverDown,
    VersionAnnounced,
    VersionReceived,
    VersionRejected,
    WeightReceiver,
)
from sgpo_async.transport import Mailbox, ReliableSender
from sgpo_async.weights import StoreReader
from sgpo_async.wire.records import Ack, Goodbye, Heartbeat, Lease, Message, Ready, Refused, Release, Stop

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.02  # for a message of the hub, while the engine is idle
ENGINE_WAIT_S = 0.01  # for results of servers; an engine in this process computes instead of waiting
UNACKNOWLEDGED = 512  # rollouts that may be on their way to the hub at one time
RESEND_AFTER_S = 10.0
PULL_S = 600.0  # for the weight receiver to pull one version


class Service:
    """Serves one hub until it is told to stop, or until the hub or the weight sender is gone.

    Args:
        mailbox: the connection to the hub.
        node: the weight receiver of this session.
        engine: a warm engine.
        tokenizer: of the model.
        run: the configuration of the run.
    """

    def __init__(self, *, mailbox: Mailbox, node: WeightReceiver, engine: Engine, tokenizer: Any, run: Run):
        self._mailbox, self._node, self._engine = mailbox, node, engine
        self._run = run
        self._sampler = RolloutSampler(engine, tokenizer, run.tasks)
        self._sender = ReliableSender(window=UNACKNOWLEDGED, resend_after_s=RESEND_AFTER_S)
        self._waiting: deque[Lease] = deque()
        self._granted = 0  # leases that were asked for and are not finished
        self._busy_s = 0.0
        self._reported: int | None = None  # the version in the last heartbeat
        engine.reset()  # a warm engine may hold weights of an earlier session under the same version numbers
        self._connections = mailbox.dealer.connections
        self._started = self._beaten = time.monotonic()
        self.finished = False  # the run is over, not just this session

    def serve(self, *, stopping: Callable[[], bool]) -> str:
        """Run the loop until it ends; return the reason."""
        try:
            reason = None
            while reason is None and not stopping():
                if reason := self.receive() or self.refresh():
                    break
                self.admit()
                self.generate()
                self.publish()
            reason = reason or "stopped"
            self._leave(reason)
            return reason
        finally:
            self._sampler.close()
            self._engine.reset()

    def receive(self) -> str | None:
        """Take the hub's messages; returns a reason to end the session, if there is one.

        A connection that was lost and is back may have cost leases or credit, which are not sent again.
        """
        status = self._engine.load_status()
        idle = self._engine.version is None or status.running + status.waiting == 0
        for message in self._mailbox.receive(IDLE_WAIT_S if idle else 0.0):
            if reason := self._take(message):
                return reason
        lost = self._mailbox.dealer.connections != self._connections
        return "the connection to the hub was lost" if lost else None

    def _take(self, message: Message) -> str | None:
        match message:
            case Lease():
                self._waiting.append(message)
            case Ack():
                self._sender.acknowledge(message)
            case Stop():
                self.finished = True
                return message.reason
            case Refused():
                return f"refused: {message.reason}"
        return None

    def refresh(self) -> str | None:
        """Load the newest version that the weight receiver holds; returns a reason to end if the session is over."""
        newest: VersionReceived | VersionAnnounced | None = None
        for event in self._node.poll():
            match event:
                case VersionReceived() | VersionAnnounced():
                    newest = event
                case VersionRejected():
                    log.warning("weights version %d: %s", event.version, event.reason)
                case ReceiverDown():
                    return f"session down: {event.reason}"
        if newest is not None:
            self._load(newest)
        return None

    def _load(self, event: VersionReceived | VersionAnnounced) -> None:
        """Load a version. After a failed load the engine is out of service until a later version is loaded whole."""
        if isinstance(event, VersionReceived):
            read = partial(_read, event.path, event.version)
            weights = Weights(version=event.version, digest=event.digest, read=read)
        else:
            read, groups = partial(self._pull, event.version), self._node.groups
            weights = Weights(version=event.version, digest=event.digest, read=read, groups=groups)
        try:
            self._engine.load(weights)
        except Superseded:
            return  # a newer version is already there: its event follows
        except WeightsError as error:
            log.warning("weights version %d: %s", event.version, error)

    def _pull(self, version: int) -> dict[str, torch.Tensor]:
        """Have the weight receiver pull a version and read it; called by a thread of an engine that lives elsewhere."""
        try:
            path = self._node.pull(version).result(PULL_S)
        except TimeoutError:
            raise SessionError(f"weights version {version}: not pulled within {PULL_S:g} s") from None
        return _read(path, version)

    def admit(self) -> None:
        """Start the leases that admit the engine's version; ask for more leases while slots would stay empty."""
        version = self._engine.version
        if version is None:
            return
        while self._waiting and self._waiting[0].min_version <= version:
            self._start(self._waiting.popleft())
        wanted = self._lease_target() - self._granted
        if wanted > 0 and self._mailbox.send(Ready(tasks=wanted, version=version)):
            self._granted += wanted

    def _lease_target(self) -> int:
        """Enough leases to fill every slot, and one more, so that a free slot never waits for the network."""
        return -(-self._run.engine.slots // self._run.rollout.size) + 1

    def _start(self, lease: Lease) -> None:
        try:
            self._sampler.add(lease)
        except EngineError as error:
            self._give_back(lease, error)

    def _give_back(self, lease: Lease, error: EngineError) -> None:
        """Return a lease that no actor can serve, such as one with too long a prompt."""
        log.warning("task %d: %s", lease.task, error)
        self._mailbox.send(Release(task=lease.task, attempt=lease.attempt, reason=str(error), servable=False))
        self._granted -= 1

    def generate(self) -> None:
        """One step of engine and verifiers; finished rollouts go to the sender."""
        began = time.monotonic()
        status = self._engine.load_status()
        for outcome in self._sampler.step(ENGINE_WAIT_S):
            if isinstance(outcome, Unservable):
                self._give_back(outcome.lease, outcome.error)
                continue
            self._sender.offer(outcome.rollout)
            self._granted -= outcome.last
        if status.running + status.waiting:
            self._busy_s += time.monotonic() - began

    def publish(self) -> None:
        """Send the rollouts that are new or overdue for acknowledgement, and a heartbeat when it is due.

        The hub leases by version: it is told at once of a new one.
        """
        for line in self._engine.events():
            log.info("%s", line)
        now = time.monotonic()
        for rollout in self._sender.due(now):
            self._mailbox.send(rollout)
        if now - self._beaten >= self._run.hub.heartbeat_s or self._engine.version != self._reported:
            self._beat(now)

    def _beat(self, now: float) -> None:
        self._beaten, self._reported = now, self._engine.version
        status = self._engine.load_status()
        leases = [lease.task for lease in (*self._waiting, *self._sampler.leases)]
        heartbeat = Heartbeat(
            state="joining" if self._reported is None else "serving",
            version=-1 if self._reported is None else self._reported,
            running=status.running,
            tokens=status.tokens,
            busy_s=self._busy_s,
            wall_s=now - self._started,
            tasks=np.asarray(leases, dtype=np.int32),
        )
        self._mailbox.send(heartbeat)

    def _leave(self, reason: str) -> None:
        """Give every lease back and say goodbye; the hub issues them again at once."""
        for lease in (*self._waiting, *self._sampler.leases):
            self._mailbox.send(Release(task=lease.task, attempt=lease.attempt, reason=reason))
        self._mailbox.send(Goodbye(reason=reason))


def _read(path: str, version: int) -> dict[str, torch.Tensor]:
    """Read a version from the local store, with a new reader: a background load may outlast the session."""
    reader = StoreReader(path)
    try:
        return reader.tensors(version)
    finally:
        reader.close()
