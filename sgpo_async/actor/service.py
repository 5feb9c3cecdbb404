"""An actor's work for one run: leases in, rollouts out, weights in flight. One thread, one loop.

    hub ── Lease, Ack, Revoked, Stop ──▶ receive ─▶ admit ─▶ generate ─▶ publish ── Progress, Rollout, Ready ──▶ hub
    weight sender ── Torch RPC ──▶ weight receiver ── version, path ──▶ refresh ─▶ engine.load
                                   └─ store ─▶ senders ── Torch RPC ──▶ other actors
    membership: Hello ─▶ Welcome ─▶ serving ── connection or session lost ──▶ Hello ...

The loop waits in `receive` while the engine is idle, and in `generate` while servers generate; both waits are short. A
lease waits in `admit` until the engine holds a version that the lease admits. A rollout waits in the sender until the
hub acknowledges it.

A lost connection, a restarted hub or a broken weight session does not end the work: the engine continues with its
leases and weights while the membership is renewed.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sgpo_async.actor.membership import Membership
from sgpo_async.actor.senders import Senders
from sgpo_async.actor.shared_store import SharedStore
from sgpo_async.config import Run
from sgpo_async.engines.adapted import AdapterWeights, BaseModel
from sgpo_async.engines.base import Engine, Weights
from sgpo_async.errors import EngineError, Superseded, WeightsError
from sgpo_async.logs import fields
from sgpo_async.model.canary import canary_of
from sgpo_async.model.folder import model_folder
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
from sgpo_async.weights.short_digest import digest_text, short_digest
from sgpo_async.wire.records import (
    Ack,
    Canary,
    CloseSender,
    Goodbye,
    Heartbeat,
    Lease,
    Message,
    OpenSender,
    Ready,
    Refused,
    Release,
    Revoked,
    Rollout,
    Stop,
    Welcome,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.02  # for a message from the hub, while the engine is idle
ENGINE_WAIT_S = 0.01  # for results of servers; an engine in this process computes instead of waiting
UNACKNOWLEDGED = 512  # rollouts that may be on their way to the hub at one time
RESEND_AFTER_S = 10.0
HANDOVER_S = 5.0  # how long an actor that leaves waits until the hub has acknowledged its rollouts


class Service:
    """Serves one run until it is told to stop, or until the hub belongs to another run.

    Args:
        mailbox: the connection to the hub.
        membership: says Hello, now and after every loss of the connection.
        senders: serve the weights to other actors.
        engine: a warm engine.
        tokenizer: of the model.
        run: the configuration of the run.
    """

    def __init__(
        self, *, mailbox: Mailbox, membership: Membership, senders: Senders, engine: Engine, tokenizer: Any, run: Run
    ) -> None:
        self._mailbox, self._membership, self._engine = mailbox, membership, engine
        self._senders = senders
        self._run = run
        self._adapter_scale = run.learner.lora.scale
        self._base = BaseModel(model_folder(run.model.path), run.model.dtype)  # read only if adapters are trained
        self._sampler = RolloutSampler(engine, tokenizer, run.tasks)
        self._sender = ReliableSender(window=UNACKNOWLEDGED, resend_after_s=RESEND_AFTER_S)
        self._waiting: deque[Lease] = deque()
        self._finished: list[Rollout] = []  # since the last `publish`
        self._granted = 0  # leases requested and not finished
        self._busy_s = self._weights_s = 0.0
        self._heartbeat_weights: tuple[int | None, int] = (None, 0)  # version and digest in the last heartbeat
        engine.reset()  # a warm engine may hold weights of another run under the same version numbers
        engine.watch(canary_of(tokenizer), every_s=run.hub.canary_s)
        self._report_s = run.hub.progress_s
        self._started = self._heartbeat_at = self._progress_at = time.monotonic()
        self._report_whole = False  # the hub may have lost reports
        self.run_over = False

    def serve(self, *, stopping: Callable[[], bool]) -> str:
        """Run the loop until it ends; return the reason.

        Raises Refusal if the hub refuses this actor for good, HubError if it has been gone for too long.
        """
        try:
            reason = None
            while reason is None and not stopping():
                self._membership.advance(self._held())
                if reason := self.receive():
                    break
                self.refresh()
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
        """Process the hub's messages; returns a reason to end, if there is one."""
        status = self._engine.load_status()
        idle = self._engine.version is None or status.running + status.waiting == 0
        # What still waits after `admit` needs a newer version.
        for_weights = idle and (self._engine.version is None or bool(self._waiting))
        began = time.monotonic()
        received = self._mailbox.receive(IDLE_WAIT_S if idle else 0.0)
        if for_weights:
            self._weights_s += time.monotonic() - began
        for message in received:
            if reason := self._take(message):
                return reason
        return None

    def _take(self, message: Message) -> str | None:
        match message:
            case Lease():
                self._report_s = message.report_s
                if (message.task, message.attempt) not in self._held():  # it may arrive twice
                    self._waiting.append(message)
            case Ack():
                self._sender.acknowledge(message)
            case Revoked():
                self._drop(message.task, message.attempt)
            case OpenSender():
                self._senders.open(message)
            case CloseSender(sender=sender):
                self._senders.close(sender)
            case Welcome():
                return self._welcomed(message)
            case Refused():
                self._membership.refused(message)
            case Stop():
                self.run_over = True
                return message.reason
        return None

    def _welcomed(self, welcome: Welcome) -> str | None:
        """Continue as a member: send again what may have been lost with the connection."""
        if not self._membership.welcomed(welcome):
            return "the hub belongs to another run"
        self._granted = len(self._waiting) + len(self._sampler.leases)
        self._heartbeat_weights = (None, 0)
        self._sender.resend()
        self._report_whole = True
        if self._granted:
            self._progress_at = -math.inf  # the next report is due
        return None

    def _held(self) -> list[tuple[int, int]]:
        """(task, attempt) of every lease whose rollouts the hub has not all acknowledged."""
        leases = {(lease.task, lease.attempt) for lease in (*self._waiting, *self._sampler.leases)}
        finished = {(rollout.task, rollout.attempt) for rollout in self._finished}
        return sorted(leases | finished | self._sender.leases)

    def _drop(self, task: int, attempt: int) -> None:
        """Stop working on a lease that the hub has taken back."""
        waiting = [lease for lease in self._waiting if (lease.task, lease.attempt) == (task, attempt)]
        for lease in waiting:
            self._waiting.remove(lease)
        self._granted -= bool(waiting or self._sampler.cancel(task, attempt))
        self._finished = [one for one in self._finished if (one.task, one.attempt) != (task, attempt)]
        self._sender.forget(task, attempt)

    def refresh(self) -> None:
        """Load the newest version that the weight receiver holds."""
        newest: VersionReceived | VersionAnnounced | None = None
        for event in self._membership.node_events():
            match event:
                case VersionReceived() | VersionAnnounced():
                    newest = event
                    if isinstance(event, VersionReceived):
                        sizes = event.received / 1e6, event.nbytes / 1e6
                        log.debug("weights version %d: %.2f of %.2f MB in %.2f s", event.version, *sizes, event.seconds)
                case VersionRejected():
                    log.warning("weights version %d: %s", event.version, event.reason)
                case ReceiverDown():
                    self._membership.session_down(f"session down: {event.reason}")
                    return
        if newest is not None and (newest.version, short_digest(newest.digest)) != self._weights_served:
            self._load(newest)

    def _load(self, event: VersionReceived | VersionAnnounced) -> None:
        """Load a version. After a failed load the engine is out of service until a later version is loaded whole."""
        began = time.monotonic()
        try:
            self._engine.load(self._weights(event))
        except Superseded:
            return  # a newer version is already there: its event follows
        except WeightsError as error:
            log.warning("weights version %d: %s", event.version, error)
        finally:
            self._weights_s += time.monotonic() - began

    def _weights(self, event: VersionReceived | VersionAnnounced) -> Weights:
        version, digest = event.version, event.digest
        if isinstance(event, VersionAnnounced):
            groups = self._receiver.groups
            return Weights(version=version, digest=digest, read=partial(self._pull, version), groups=groups)
        read = partial(_read, event.path, version)
        if not self._adapter_scale:
            return Weights(version=version, digest=digest, read=read)
        return AdapterWeights(version=version, digest=digest, read=read, base=self._base, scale=self._adapter_scale)

    def _pull(self, version: int) -> dict[str, torch.Tensor]:
        """Have the weight receiver pull a version, then read it; called by a thread of an engine that uses servers."""
        path = self._receiver.pull(version).result()  # each bucket has a deadline, after which this fails
        return _read(path, version)

    @property
    def _receiver(self) -> WeightReceiver:
        """The weight receiver of a run whose weight sender broadcasts: actors then share no store."""
        assert not isinstance(self._membership.node, SharedStore)
        return self._membership.node

    def admit(self) -> None:
        """Start the leases that admit the engine's version; ask for more leases while slots would stay empty."""
        version = self._engine.version
        if version is None:
            return
        while self._waiting and self._waiting[0].min_version <= version:
            self._start(self._waiting.popleft())
        wanted = self._wanted_leases()
        if wanted > 0 and self._membership.serving and self._mailbox.send(Ready(tasks=wanted, version=version)):
            self._granted += wanted

    def _wanted_leases(self) -> int:
        """How many more leases fill all slots, and one more, so that a free slot never waits for the network.

        Rollouts are counted and not leases: the slots of a group's short rollouts are free long before its longest one
        ends. Rollouts that wait for a verdict need no slot; if there are more of them than slots, verdicts are late,
        and more leases would only wait longer.
        """
        slots, size = self._run.engine.slots, self._run.rollout.size
        requested = self._granted - len(self._sampler.leases)  # or not begun
        generating = max(self._sampler.generating, self._sampler.unfinished - slots)
        return -(-(slots - generating) // size) - requested + 1

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
        """One step of engine and verifiers."""
        began = time.monotonic()
        status = self._engine.load_status()
        for outcome in self._sampler.step(ENGINE_WAIT_S):
            if isinstance(outcome, Unservable):
                self._give_back(outcome.lease, outcome.error)
                continue
            self._finished.append(outcome.rollout)
            self._granted -= outcome.last
        if status.running + status.waiting:
            self._busy_s += time.monotonic() - began

    def publish(self) -> None:
        """Send what is due: a report, rollouts that are new or not acknowledged, a heartbeat.

        A new version is reported at once, because the hub leases by version.
        """
        for line in self._engine.events():
            log.info("%s", line)
        if not self._membership.serving:
            return
        for found in self._senders.poll():
            self._mailbox.send(found)
        for scored in self._engine.canaries():
            self._mailbox.send(
                Canary(engine=scored.engine, version=scored.version, digest=scored.digest, logprobs=scored.logprobs)
            )
        now = time.monotonic()
        report_due = now - self._progress_at >= self._report_s
        if report_due:
            self._progress_at = now
            self._send_reports()
        if report_due or self._engine.reproducible:  # else this favours short rollouts: `rollout.partial`
            self._deliver_finished()
        for rollout in self._sender.due(now):
            self._mailbox.send(rollout)
        if now - self._heartbeat_at >= self._run.hub.heartbeat_s or self._weights_served != self._heartbeat_weights:
            self._send_heartbeat(now)

    def _send_reports(self) -> None:
        """Report what was sampled since the last report; all of it if the hub may not have the earlier ones."""
        sent = [self._mailbox.send(report) for report in self._sampler.progress(whole=self._report_whole)]
        self._report_whole = not all(sent)

    def _deliver_finished(self) -> None:
        for rollout in self._finished:
            self._sender.offer(rollout)
        self._finished.clear()

    def _send_heartbeat(self, now: float) -> None:
        version, digest = self._weights_served
        if version is not None and (version, digest) != self._heartbeat_weights:
            text = "weights version %d, digest %s"
            log.debug(text, version, digest_text(digest), extra=fields(event="version", version=version))
        self._heartbeat_at, self._heartbeat_weights = now, (version, digest)
        status = self._engine.load_status()
        leases = [task for task, _ in self._held()]
        heartbeat = Heartbeat(
            state="joining" if version is None else "serving",
            version=-1 if version is None else version,
            digest=digest,
            running=status.running,
            tokens=status.tokens,
            busy_s=self._busy_s,
            weights_s=self._weights_s,
            wall_s=now - self._started,
            tasks=np.asarray(leases, dtype=np.int32),
        )
        self._mailbox.send(heartbeat)

    @property
    def _weights_served(self) -> tuple[int | None, int]:
        return self._engine.version, self._engine.digest

    def _leave(self, reason: str) -> None:
        """Send all that was sampled, and say goodbye; other actors continue the unfinished rollouts."""
        if not self._membership.serving:
            return
        self._send_reports()
        self._deliver_finished()
        deadline = time.monotonic() + HANDOVER_S
        while len(self._sender) and not self.run_over and time.monotonic() < deadline:
            for rollout in self._sender.due(time.monotonic()):
                self._mailbox.send(rollout)
            for message in self._mailbox.receive(IDLE_WAIT_S):
                if isinstance(message, Ack):
                    self._sender.acknowledge(message)
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
