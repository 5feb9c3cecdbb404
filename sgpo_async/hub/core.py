"""The hub's core: a deterministic state machine without I/O.

    event ──▶ handle ── 1. process the event (one handler per kind of event or message)
                     ── 2. apply the rules to the new state, in this order:
                              evaluation rounds ▸ stale groups ▸ batch ▸ leases ▸ end of the run
                           (not after most rollouts: one that completes no group changes nothing that they depend on)
                     ── 3. at a Tick, check that all ledgers balance ──▶ effects

The core never waits and never reads a clock: the time is an argument, and timeouts are checked when a Tick arrives.
The same events at the same times produce the same effects.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from sgpo_async.config import Run, to_plain
from sgpo_async.errors import HubError
from sgpo_async.hub import events as ev
from sgpo_async.hub import snapshot
from sgpo_async.hub.actors import FROM_HUB, Actor, Actors
from sgpo_async.hub.admission import evaluation_limit, kept_back
from sgpo_async.hub.evaluation import Evaluation
from sgpo_async.hub.events import CloseSender, Effect, Event, Left, Send, Shutdown, UseStore, Warn
from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.hub.leases import LeaseTable, RunningLease
from sgpo_async.hub.rollout_checks import PROMPT_DIFFERS, Limits, report_violation, violation
from sgpo_async.hub.served_weights import SILENT, ServedWeights, newest, tolerance_of
from sgpo_async.hub.stall import StallWatch
from sgpo_async.hub.status import status
from sgpo_async.hub.stragglers import late_lease
from sgpo_async.hub.training import Training
from sgpo_async.hub.validation import refusal_reason, tokenizer_mismatch
from sgpo_async.hub.weight_routes import WeightRoutes
from sgpo_async.logs import one_line
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.transport.base import owner_of
from sgpo_async.wire import records as wire

if TYPE_CHECKING:
    from sgpo_async.tasks.base import ProblemSource
    from sgpo_async.tasks.benchmarks import Benchmark

FINISH_GRACE_S = 8.0  # how long the hub waits for the members' Goodbye after the learner has finished
INTERRUPT_GRACE_S = 0.5  # how long it waits for actors after an interrupt
CHECKPOINT_GRACE_S = 30.0  # ... and for the learner, which finishes its step and writes a checkpoint
SILENT_S = 5.0  # a rank that has been silent for so long will write no checkpoint
REPORTS_PER_S = 32  # of all actors: the more there are, the less often each reports (docs/performance.md)
RETURN_S = 5.0  # how long an actor may take to send a new Hello after its weight sender has ended
RESTART_RETURN_S = 30.0  # ... after a restart of the hub
FAIR_S = 3.0  # after a publication, how long tasks are kept for actors that do not serve the new weights yet
CHECK_S = 1.0  # how often the ledgers are checked
MAX_EARLY = 4096  # messages that are kept until a Published arrives
MAX_INVALID = 3  # after so many invalid messages and rollouts, an actor is refused for good
MAX_QUARANTINED = 100  # names of actors with one key; who has it could take another name again and again


Sample = wire.Rollout | wire.Progress | wire.Canary
"""What an actor has computed with certain weights."""


class HubCore:
    """The members, tasks and rules of one run."""

    def __init__(
        self,
        run: Run,
        source: ProblemSource,
        *,
        benchmarks: Sequence[Benchmark] = (),
        store: str = "",
        run_id: str = "",
        now: float = 0.0,
    ) -> None:
        """`store` is the path of the weight store; `run_id` is told to actors, which may outlive a run."""
        self.run, self.store, self.run_id = run, store, run_id
        self.machine = ""  # that the store is on
        self.now = self.started = now
        task_sampler = TaskSampler(run, source, benchmarks)
        self.training, self.evaluation = Training(run, task_sampler), Evaluation(task_sampler)
        self.actors, self.learner_ranks = Actors(), LearnerRanks()
        # The weight sender beside the learner's store itself broadcasts to engines.
        broadcasts, folder = run.engine.broadcasts, run.hub.weight_folder
        self.weight_routes = WeightRoutes(
            self.actors,
            run_id=run_id,
            fanout=0 if broadcasts else run.hub.weight_fanout,
            shared=not broadcasts,
            folder=folder and f"{folder.removesuffix('/')}/{run_id}",
        )
        self.published = -1  # newest version in the weight store
        self.published_at = now
        self.leased_since = 0  # training leases since then
        self.served = ServedWeights()
        # What actors have sent of weights that exist, but whose Published has not arrived yet; see `_is_early`.
        self.early: dict[tuple[Any, ...], tuple[bytes, Sample]] = {}
        self.learner_bfloat16 = False  # whether the learner computes in bfloat16
        self.learner_store = ""  # path at which rank 0 has the weight store open
        self.last_restore = ("", -1)  # id of the last Restore, and the version in its answer
        self.vocabulary = 0  # number of token ids that the learner's model knows; 0: no learner has joined
        self.tokenizer = ""  # fingerprint of the first learner's tokenizer; all members must have the same
        self.rejected: Counter[str] = Counter()  # number of rejected messages by reason
        self.last_rejection = ""
        self.refused = 0  # number of refused members
        self.forbidden = False  # whether somebody else has sent a message of the learner
        # Actors refused for invalid messages: (public key, name) -> reason. So nobody has another one's name refused.
        self.quarantined: dict[tuple[bytes, str], str] = {}
        self.restarts = 0  # of the hub process
        self.moved = 0  # leases taken from slow actors
        self.stall = StallWatch(run.hub.stall_s, moved_at=now)
        self.closing: tuple[str, float] | None = None  # reason and deadline, once the run is ending
        self.interrupted = self.closed = False
        self.ranks_until = now  # how long the hub waits for the learner after an interrupt
        self._check_at = now
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Process one event that happened at `now` (monotonic seconds); return the effects, in order."""
        self.now, self._effects = now, []
        if not self.closed:
            if self._process(event):
                self._apply_rules()
            if isinstance(event, ev.Tick) and now >= self._check_at:  # rarely, because it counts all that is in flight
                self._check_at = now + CHECK_S
                self.check_ledgers()
        elif isinstance(event, ev.HubRestarted) and self.closing:
            self._effects.append(Shutdown(self.closing[0]))  # the process was killed before it had ended
        return self._effects

    def check_ledgers(self) -> None:
        """Assert that no task and no rollout is lost or counted twice."""
        for leases in self._lease_tables:
            leases.check()

    def __getstate__(self) -> dict[str, Any]:
        """The state between two events, which `hub.recovery` saves."""
        return self.__dict__ | {"_effects": []}

    def status(self) -> dict[str, Any]:
        """The state of the run; see `sgpo_async.hub.status` for the keys."""
        return status(self)

    # ---- 1. process the event

    def _process(self, event: Event) -> bool:
        """Process an event; return whether the rules may have something to do."""
        match event:
            case ev.Received(member, wire.Rollout() as rollout):
                return self._rollout(member, rollout)
            case ev.Received(member, message) if event.is_question:
                self._answer(member, message)
                return False
            case ev.Received(member, message):
                self._received(member, message)
            case ev.Rejected(member, reason, other_release):
                self._reject(member, "malformed message", detail=reason)
                if other_release and member not in self.actors and self.learner_ranks.rank_of(member) is None:
                    self._refuse(member, reason)  # it cannot read this either, and so knows why
            case ev.Forbidden(member, reason):
                self._forbid(member, reason)
            case ev.SenderUp() | ev.SenderDown():
                self._sender_of_hub(event)
            case ev.Disconnected(member):
                if (actor := self.actors.get(member)) and actor.return_by is None:
                    self._expect_return(actor, RETURN_S, "its connection was closed")
            case ev.Expelled(who, reason):
                self._expel(who, reason)
            case ev.Tick():
                self._check_timeouts()
                self._move_late_lease()
                self.served.forget_silent(self.now - SILENT * self.run.hub.canary_s)
                if not self.closing and self.stall.look(self.status, now=self.now):
                    self._effects.append(Warn(self.stall.stalled))
                if alarm := self.training.settled.alarm():
                    self._effects.append(Warn(alarm))
            case ev.HubRestarted():
                self._restarted()
            case ev.Interrupted(reason, at_once):
                self._interrupted(reason, at_once=at_once)
        return True

    def _answer(self, member: bytes, question: wire.Message) -> None:
        match question:
            case wire.StatusRequest():
                self._send(member, wire.Status(status=self.status()))
            case wire.SettingsRequest():
                self._send(member, wire.Settings(settings=to_plain(self.run)))

    def _received(self, member: bytes, message: wire.Message) -> None:
        rank = self.learner_ranks.rank_of(member)
        match message:
            case wire.Hello():
                self._hello(member, message)
            case wire.Rollout():
                self._rollout(member, message)
            case wire.Progress():
                self._progress(member, message)
            case _ if member in self.actors:
                self._from_actor(self.actors[member], message)
            case _ if rank is not None:
                self._from_rank(rank, message)
            case wire.Goodbye():
                pass  # the hub has removed this member already
            case _:
                self._refuse(member, "not a member, or removed after a timeout: send Hello first")

    def _from_actor(self, actor: Actor, message: wire.Message) -> None:
        actor.last_seen = self.now
        match message:
            case wire.Ready():
                self._ready(actor, message)
            case wire.Heartbeat():
                self._heartbeat(actor, message)
            case wire.Canary():
                self._canary(actor, message)
            case wire.Release():
                self._release(actor, message)
            case wire.SenderUp() | wire.SenderDown():
                self._sender_of_actor(actor, message)
            case wire.Goodbye(reason=reason):
                self._lose_actor(actor, one_line(reason) or "it said goodbye")
            case _:
                self._reject(actor.member, f"an actor may not send {type(message).__name__}")

    def _from_rank(self, rank: int, message: wire.Message) -> None:
        self.learner_ranks.ranks[rank].last_seen = self.now
        match message:
            case wire.Heartbeat():
                pass  # last_seen is already updated
            case wire.BatchRequest():
                self._batch_request(rank, message)
            case wire.Goodbye():
                self._lose_rank(rank)
            case _ if rank == 0:
                self._from_first_rank(self.learner_ranks.ranks[0].member, message)
            case _:
                self._reject(self.learner_ranks.ranks[rank].member, f"only rank 0 may send {type(message).__name__}")

    def _from_first_rank(self, member: bytes, message: wire.Message) -> None:
        match message:
            case wire.Commit(step=step):
                self._commit(member, step)
            case wire.Published():
                self._publish(member, message)
            case wire.Evaluate(version=version):
                self._evaluate(member, version)
            case wire.SnapshotRequest(step=step):
                self._snapshot(member, step)
            case wire.Restore(state=state, id=id):
                self._restore(member, state, id)
            case wire.Finish(reason=reason):
                self._send(member, wire.Stop(reason=reason))
                self._begin_close(reason, grace=FINISH_GRACE_S)
            case _:
                self._reject(member, f"a learner may not send {type(message).__name__}")

    # ---- members join and leave

    def _hello(self, member: bytes, hello: wire.Hello) -> None:
        new_world = hello.role == "learner" and self.learner_ranks.starts_new_world(member, hello)
        joined_world = self.learner_ranks if hello.role == "learner" and not new_world else None
        taken = self._names_of_others(member, hello, new_world=new_world)
        final = tokenizer_mismatch(hello.name, hello.tokenizer, learners=self.tokenizer)
        if hello.role == "actor":
            final = self._bar(member, hello.name) or final
        if hello.road == "folder" and not self.run.hub.weight_folder:
            final = "the run has no hub.weight_folder, so set it or start the actor without --weights-by folder"
        reason = final or refusal_reason(hello, taken=taken, world=joined_world)
        if self.closing and hello.role == "actor":
            self._send(member, wire.Stop(reason=self.closing[0]))  # a late actor is not an error: it only has to stop
            return
        if self.closing or reason:
            self.refused += 1
            self._refuse(member, reason or "the run is over", final=bool(final))
            return
        if hello.role == "learner":
            self._rank_joins(member, hello, new_world=new_world)
        else:
            self._actor_joins(member, hello)

    def _bar(self, member: bytes, name: str) -> str:
        """Why this actor, or all new ones with its key, are refused for good; "" if they are not."""
        owner = owner_of(member)
        if why := self.quarantined.get((owner, name)):
            return f"quarantined after {why}; check its engine and its model"
        if member not in self.actors and sum(key == owner for key, _ in self.quarantined) >= MAX_QUARANTINED:
            whose = "with the same key" if owner else "of this run without keys"
            return f"{MAX_QUARANTINED} actors {whose} are quarantined, so no more may join; check their engines"
        return ""

    def _names_of_others(self, member: bytes, hello: wire.Hello, *, new_world: bool) -> set[str]:
        """The names that are taken. An actor cannot take that of a rank: it may be a stranger, who keeps it out."""
        actors = {actor.name for actor in self.actors.values() if actor.member != member}
        ranks = {rank.name for rank in self.learner_ranks.ranks.values() if rank.member != member}
        if hello.role == "learner":
            return set() if new_world else ranks
        return actors | ranks

    def _actor_joins(self, member: bytes, hello: wire.Hello) -> None:
        """Add an actor, or let it return with the leases that it still holds."""
        known = self.actors.get(member)
        if known and not known.welcomed and known.return_by is None:
            # A repeated Hello, while the actor's weight sender is starting.
            self._effects += self.weight_routes.replace_silent(known, now=self.now)
            return
        lost = known.route if known and known.welcomed else None
        holds = set(zip(hello.holds[::2].tolist(), hello.holds[1::2].tolist(), strict=True))
        for leases in self._lease_tables:
            for number in leases.held_by(member):
                key = (number, leases.running[number].attempt)
                if key in holds:
                    holds.remove(key)
                else:
                    self._revoke(leases, number)
        for task, attempt in sorted(holds):
            self._send(member, wire.Revoked(task=task, attempt=attempt))
        if known:
            self._effects += self.weight_routes.close(known)
        actor = self.actors.join(member, hello, now=self.now)
        self._effects += self.weight_routes.open(actor, now=self.now, direct=hello.direct, lost=lost)
        # Its answers to OpenSender may have been lost with the connection.
        self._effects += self.weight_routes.reopen(member, now=self.now)

    def _sender_of_hub(self, event: ev.SenderUp | ev.SenderDown) -> None:
        actor = self.actors.get(event.member)
        if actor is None or actor.route != FROM_HUB:
            self._effects.append(CloseSender(event.member))
        else:
            self._sender(actor, event)

    def _sender_of_actor(self, source: Actor, message: wire.SenderUp | wire.SenderDown) -> None:
        actor = self.weight_routes.served_by(source.member, message.sender)
        if actor is None:
            self._send(source.member, wire.CloseSender(sender=message.sender))
        else:
            self._sender(actor, message)

    def _sender(self, actor: Actor, found: ev.SenderUp | ev.SenderDown | wire.SenderUp | wire.SenderDown) -> None:
        """Welcome an actor whose weight sender is running, or wait for its return: it sends a new Hello."""
        if isinstance(found, ev.SenderUp | wire.SenderUp):
            if actor.return_by is not None:  # it has lost its connection meanwhile; its Hello opens another route
                self._effects += self.weight_routes.close(actor)
                return
            self._effects.append(self.weight_routes.ready(actor, found, now=self.now))
            return
        self._end_route(actor, f"the session ended: {one_line(found.reason)}")

    def _end_route(self, actor: Actor, reason: str) -> None:
        """Tell an actor that no more weights come this way, so that it says Hello again."""
        self._refuse(actor.member, reason)
        self._effects += self.weight_routes.close(actor)
        self._expect_return(actor, RETURN_S, reason)

    def _expect_return(self, actor: Actor, seconds: float, reason: str) -> None:
        actor.welcomed, actor.credit, actor.return_by, actor.away = False, 0, self.now + seconds, reason

    def _restarted(self) -> None:
        """Wait for all actors to return. The learner's ranks repeat the requests that were not answered."""
        self.restarts += 1
        for actor in self.actors.values():
            self._expect_return(actor, RESTART_RETURN_S, "it has not come back since the hub started again")
        for rank in self.learner_ranks.ranks.values():
            rank.last_seen = self.now

    def _lose_actor(self, actor: Actor, reason: str) -> None:
        self._effects.append(Left(actor.member, reason))
        for leases in self._lease_tables:
            for number in leases.held_by(actor.member):
                self._revoke(leases, number)
        self.actors.leave(actor.member)
        self.served.leave(actor.name)
        self._effects += self.weight_routes.close(actor)
        self._effects += self.weight_routes.reopen(actor.member, now=self.now)
        for other in self.weight_routes.depending_on(actor.member):  # it may hang, and its store go on existing
            self._end_route(other, f"{actor.name}, from which it has its weights, is lost")

    def _expel(self, who: bytes, reason: str) -> None:
        """End the memberships of this member, or of all with this public key; their leases go to others."""
        ranks = {rank: held for rank, held in self.learner_ranks.ranks.items() if _belongs(held.member, who)}
        actors = [actor for actor in self.actors.values() if _belongs(actor.member, who)]
        unwanted = [(held.member, held.name) for held in ranks.values()] + [(one.member, one.name) for one in actors]
        names = ", ".join(name for _, name in unwanted)
        self._effects.append(Warn(f"{reason}; " + (f"expelled: {names}" if names else "it had not joined")))
        for member in [member for member, _ in unwanted] or [who]:  # a key without members reaches nobody
            self._refuse(member, reason, final=True)
        for rank in ranks:
            self._lose_rank(rank)
        for actor in actors:
            self._lose_actor(actor, reason)

    def _revoke(self, leases: LeaseTable, number: int) -> None:
        """Take a lease back, to give it again."""
        self._send_revoked(leases.running[number])
        leases.revoke(number)

    def _send_revoked(self, lease: RunningLease) -> None:
        """Tell the actor of a lease, if it is still alive, to stop working on it."""
        self._send(lease.member, wire.Revoked(task=lease.task.number, attempt=lease.attempt))

    @property
    def _lease_tables(self) -> tuple[LeaseTable, LeaseTable]:
        return self.training.leases, self.evaluation.leases

    def _rank_joins(self, member: bytes, hello: wire.Hello, *, new_world: bool) -> None:
        self._set_tokenizer(hello.tokenizer)
        self.vocabulary = hello.vocabulary or self.vocabulary
        self.learner_bfloat16 = hello.bfloat16
        if new_world:
            self.training.batch = None  # the groups of the batch are still in the buffer
            for old in self.learner_ranks.start_new_world(hello.world_size):
                if old.member != member:
                    self._refuse(old.member, f"{hello.name} started a new learner world, which replaces this one")
        self.learner_ranks.join(member, hello, now=self.now)
        begun = self.published >= 0
        version = self.training.version
        self._send(member, wire.Welcome(store=self.store, machine=self.machine, version=version, begun=begun))

    def _set_tokenizer(self, fingerprint: str) -> None:
        """Require the first learner's tokenizer; remove the actors that joined earlier with another one."""
        self.tokenizer = self.tokenizer or fingerprint
        for actor in list(self.actors.values()):
            if mismatch := tokenizer_mismatch(actor.name, actor.tokenizer, learners=self.tokenizer):
                self.refused += 1
                self._refuse(actor.member, mismatch, final=True)
                self._lose_actor(actor, mismatch)

    def _lose_rank(self, rank: int) -> None:
        self.learner_ranks.leave(rank)
        if rank == 0:  # only rank 0 commits; other ranks may leave after their last step, before rank 0 commits it
            self.training.batch = None

    def _check_timeouts(self) -> None:
        """Remove silent members and revoke silent leases.

        The timeout of an actor is long, because its only thread may be loading weights and sends nothing meanwhile.
        The hub notices a dead actor at once by the end of its connection (Disconnected).
        """
        actor_limit = self.now - self.run.hub.lease_timeout_s
        rank_limit = self.now - self.run.learner.batch_timeout_s
        lost = [*self.actors.silent_since(actor_limit), *self.actors.overdue(self.now)]
        for actor in {one.member: one for one in lost}.values():  # one may be in both lists
            self._lose_actor(actor, actor.away or "the hub has not heard from it in time")
        for rank in [rank for rank, held in self.learner_ranks.ranks.items() if held.last_seen < rank_limit]:
            self._lose_rank(rank)
        for leases in self._lease_tables:
            for number in leases.silent_since(actor_limit):
                self._revoke(leases, number)

    def _move_late_lease(self) -> None:
        """Revoke the late lease of a slow actor if another one can take it at once."""
        for work in (self.evaluation, self.training):
            leases, heartbeat_s = work.leases, self.run.hub.heartbeat_s
            late = late_lease(
                leases.running.values(), self.actors, durations=leases.durations, now=self.now, heartbeat_s=heartbeat_s
            )
            if late is None or leases.waiting or self.closing:
                continue
            idle = self.actors.pick(late.min_version, other_than=late.member)
            if idle:
                self.moved += 1
                self._revoke(leases, late.task.number)
                lowest = work.lowest_version()
                if lowest is not None and idle.version >= lowest:  # now, because the slow actor may have more credit
                    self._lease_to(idle, work, lowest)

    # ---- messages of actors

    def _ready(self, actor: Actor, ready: wire.Ready) -> None:
        if ready.tasks < 0:
            self._reject(actor.member, "Ready.tasks must be >= 0", detail=f"got {ready.tasks}")
            return
        if not actor.welcomed:
            return  # sent before the connection was lost; the actor asks again after its return
        if reason := self._too_many_leases(actor, asked=actor.credit + ready.tasks):
            self.refused += 1
            self._refuse(actor.member, reason, final=True)
            self._lose_actor(actor, reason)
            return
        actor.credit += ready.tasks
        actor.version = self._version_of_this_run(ready.version)

    def _too_many_leases(self, actor: Actor, *, asked: int) -> str:
        """Why an actor may not have so many more leases, with the remedy; "" if it may."""
        most = self.run.hub.max_leases
        if asked + sum(len(leases.running) for leases in self._lease_tables) <= most:
            return ""  # whoever has them; those of one actor are counted only if this says nothing
        held = sum(len(leases.held_by(actor.member)) for leases in self._lease_tables)
        if asked + held <= most:
            return ""
        return (
            f"{actor.name} has {held} leases and asks for {asked}, but hub.max_leases is {most}: "
            "raise hub.max_leases or lower the actor's slots"
        )

    def _heartbeat(self, actor: Actor, heartbeat: wire.Heartbeat) -> None:
        self.actors.record_heartbeat(actor, heartbeat)
        actor.version = self._version_of_this_run(heartbeat.version)
        actor.digest = heartbeat.digest if actor.version >= 0 else 0
        for leases in self._lease_tables:
            leases.renew(actor.member, heartbeat.tasks, now=self.now)

    def _version_of_this_run(self, version: int) -> int:
        """`version`, or -1 if this run has no such version yet: the engine still serves the weights of another run."""
        return version if version <= self.training.version else -1

    def _release(self, actor: Actor, release: wire.Release) -> None:
        if release.servable:
            actor.credit = 0  # an actor that returns a lease gets no more leases until it sends Ready again
        leases = self.training.leases if release.task >= 0 else self.evaluation.leases
        lease = leases.running.get(release.task)
        if lease is None or (lease.member, lease.attempt) != (actor.member, release.attempt):
            return
        if release.servable:
            leases.revoke(release.task)
        else:
            leases.discard(release.task, "unservable")

    def _progress(self, member: bytes, progress: wire.Progress) -> None:
        work = self._work_of(member, progress)
        lease = work.leases.lease_of(member, progress)
        if lease is None or self._is_early(member, progress, [part.versions for part in progress.partial]):
            return
        if reason := report_violation(lease.terms, progress, self._limits, arrived=lease.arrived):
            self._invalid(work.leases, member, progress, reason)
        else:
            work.leases.report(progress, now=self.now)

    def _rollout(self, member: bytes, rollout: wire.Rollout) -> bool:
        """Accept or reject a rollout; return False if it was accepted and its group is not complete."""
        work = self._work_of(member, rollout)
        lease = work.leases.lease_of(member, rollout)
        expected = lease is not None and rollout.slot not in lease.arrived.rollouts
        if expected and self._is_early(member, rollout, [rollout.versions]):
            return True
        self._send(member, wire.Ack(task=rollout.task, attempt=rollout.attempt, slot=rollout.slot))
        if lease is None or not expected:
            self._unexpected_rollout(member, rollout, work)
            return True
        prompt = lease.arrived.prompt(guided=rollout.guided)
        reason = violation(lease.terms, rollout, self._limits, prompt=prompt)
        if not reason:
            return work.leases.arrive(rollout, now=self.now)
        if reason == PROMPT_DIFFERS and lease.continues_another:
            self.rejected[reason] += 1  # nobody knows which of the two actors is wrong, so both begin anew
            work.leases.forget(rollout.task)
            self._send(member, wire.Revoked(task=rollout.task, attempt=rollout.attempt))
        else:
            self._invalid(work.leases, member, rollout, reason)
        return True

    def _canary(self, actor: Actor, canary: wire.Canary) -> None:
        if not self.training.first_version <= canary.version <= self.training.version:
            return  # of another run, or of before the last Restore, when a learner may have died before its Published
        if self._is_early(actor.member, canary, [np.array([canary.version])]):
            return
        if reason := self.served.canary_objection(actor.name, canary):
            self._reject(actor.member, reason)
            return
        tolerance = tolerance_of(self.run, learner_bfloat16=self.learner_bfloat16)
        self._effects += map(Warn, self.served.judge(actor.name, canary, tolerance=tolerance, now=self.now))

    @property
    def _limits(self) -> Limits:
        return Limits(vocabulary=self.vocabulary, newest=self.training.version, objection=self.served.objection)

    def _is_early(self, member: bytes, message: Sample, versions: Sequence[np.ndarray]) -> bool:
        """Whether this is of weights whose Published is still on its way; it is then kept until that arrives.

        Weights reach an engine in other ways than Published reaches the hub, so either may be first. After a lost
        connection, the Published of a version may also come after that of the next one. Of what an actor repeats, and
        of the scores of one engine, the last is kept. Beyond MAX_EARLY, the message is forgotten without an answer: a
        rollout is sent again, a report or a score is lost.
        """
        if newest(versions) > self.training.version or not self.served.awaits(versions):
            return False
        key = _key(member, message)
        self.early.pop(key, None)  # the last one comes after what it continues
        if len(self.early) < MAX_EARLY:
            self.early[key] = member, message
        return True

    def _process_early(self) -> None:
        """Process what was kept; what is still early is kept again."""
        kept, self.early = self.early, {}
        for member, message in kept.values():
            self._received(member, message)

    def _work_of(self, member: bytes, sent: wire.Rollout | wire.Progress) -> Training | Evaluation:
        """Where this belongs, which shows that its sender lives."""
        if member in self.actors:
            self.actors[member].last_seen = self.now
        return self.training if sent.purpose == "train" else self.evaluation

    def _invalid(self, leases: LeaseTable, member: bytes, sent: wire.Rollout | wire.Progress, reason: str) -> None:
        """End the lease for which an actor has sent an invalid rollout or report."""
        leases.reject(sent.task)
        self._send(member, wire.Revoked(task=sent.task, attempt=sent.attempt))
        self._reject(member, reason, detail=f"task {sent.task}")

    def _unexpected_rollout(self, member: bytes, rollout: wire.Rollout, work: Training | Evaluation) -> None:
        """Count a rollout that no lease expects.

        If its task is known or its lease was issued before a Restore, it is a duplicate or too late. Otherwise the hub
        never issued its task and rejects it.
        """
        if work.has_dispatched(rollout.task) or rollout.attempt < work.leases.first_attempt:
            work.leases.duplicates += 1
        else:
            self._reject(member, "rollout of an unknown task", detail=f"{rollout.purpose} {rollout.task}")

    # ---- messages of the learner

    def _batch_request(self, rank: int, request: wire.BatchRequest) -> None:
        wanted, before = (request.step, request.part), self.learner_ranks.requested.get(rank, (-1, 0))
        if request.step <= self.learner_ranks.last_committed or wanted < before:
            return  # a repeated request that arrived late
        member = self.learner_ranks.ranks[rank].member
        self.learner_ranks.requested[rank] = wanted
        self.learner_ranks.stopping = self.learner_ranks.stopping or request.stopping
        if request.step == self.training.step and 0 <= request.part < self.training.next_part:
            self._send(member, self.training.shard(rank, request.part))  # a repeated request
        elif wanted == before:
            self._send_pending(member)

    def _commit(self, member: bytes, step: int) -> None:
        if self.training.batch_is_whole and step == self.training.step:
            self.training.commit()
            self.learner_ranks.mark_committed(step)
        if step == self.training.step - 1:  # committed just now, or earlier if the Committed message was lost
            self._send(member, wire.Committed(step=step, status=self.status()))
        else:
            self._refuse(member, f"the hub has sent no batch of step {step}: it is at step {self.training.step}")

    def _publish(self, member: bytes, message: wire.Published) -> None:
        version, store = message.version, message.store
        if message.is_elsewhere:  # `learner_weights` keeps the versions of another machine until they are here
            self._reject(member, "Published of weights that the hub does not have", detail=store)
            return
        if version < 0 or version > self.training.version:
            detail = f"{version} after {self.published}"
            self._reject(member, "Published of a version that is out of order", detail=detail)
            return
        self.served.publish(version, message.digest, message.canary, oldest=self._oldest_token())
        self._process_early()
        if version < self.published:
            return  # sent again after a lost connection: only its digest may be news
        if store != self.learner_store:
            self._effects.append(UseStore(store))
        if version > self.published:
            self.published_at, self.leased_since = self.now, 0
        self.published, self.learner_store = version, store
        if not self.evaluation.begun:
            self.evaluation.request(version)  # measures the pass rates at the start of the run

    def _oldest_token(self) -> int:
        """The oldest version of which a token may still arrive, or that an engine still serves."""
        leased = [lease.oldest for leases in self._lease_tables for lease in leases.running.values()]
        carried = [one.oldest_version for leases in self._lease_tables for one in leases.carried.values()]
        serving = [actor.version for actor in self.actors.values() if actor.version >= 0]
        known = [version for version in (*leased, *carried, *serving) if version is not None]
        return min([self.training.version - self.run.hub.max_lag - 1, *known])

    def _evaluate(self, member: bytes, version: int) -> None:
        if version > self.training.version:
            self._reject(member, "Evaluate of a version that does not exist", detail=str(version))
        elif result := self.evaluation.request(version):
            self._deliver(member, result)
        else:
            self._send_pending(member)

    def _send_pending(self, member: bytes) -> None:
        """Tell a rank that waits how long ago the run made progress."""
        self._send(member, wire.Pending(idle_s=self.now - self.stall.moved_at))

    def _deliver(self, member: bytes, result: wire.Evaluated) -> None:
        self._send(member, result)
        self.evaluation.mark_delivered(result.version)

    def _snapshot(self, member: bytes, step: int) -> None:
        if step != self.training.step:
            reason = f"the hub has no snapshot of step {step}: it is at step {self.training.step}"
            self._refuse(member, reason)
            return
        self._send(member, wire.Snapshot(step=step, state=snapshot.dump(self.training, self.evaluation)))

    def _restore(self, member: bytes, state: bytes, id: str) -> None:
        if id and id == self.last_restore[0]:
            self._send(member, wire.Restored(version=self.last_restore[1]))  # a repeated request
            return
        try:
            restored = snapshot.load(state, training=self.training, evaluation=self.evaluation)
        except HubError as error:
            self._refuse(member, str(error))
            return
        for leases in self._lease_tables:
            for lease in leases.running.values():
                self._send_revoked(lease)
        self.training, self.evaluation = restored
        self.early.clear()  # it belongs to leases, or to versions, from before the restore
        self.last_restore = (id, self.training.version)
        self._send(member, wire.Restored(version=self.training.version))

    # ---- 2. apply the rules

    def _apply_rules(self) -> None:
        result = self.evaluation.advance(self.training.version)
        if result and 0 in self.learner_ranks.ranks:
            self._deliver(self.learner_ranks.ranks[0].member, result)
        self.training.drop_stale()
        for number in self.training.certain_to_be_dropped():
            self._send_revoked(self.training.leases.running[number])
            self.training.drop_unfinished(number)
        if self.closing is None:
            self._form_batch()
            self._lease_tasks()
        else:
            self._form_no_batch(self.closing[0])
            self._shut_down(*self.closing)

    def _form_batch(self) -> None:
        if self.learner_ranks.stopping:
            self._form_no_batch(self.learner_ranks.stopping)
        if self.training.batch_is_whole or not self.learner_ranks.all_requested:
            return
        for rank, (step, _) in list(self.learner_ranks.requested.items()):
            if step != self.training.step:
                self._refuse_step(rank, step)
        part = self.training.next_part
        if self.learner_ranks.all_wait_for(self.training.step, part) and self.training.form(self.learner_ranks.size):
            for rank, held in sorted(self.learner_ranks.ranks.items()):
                self._send(held.member, self.training.shard(rank, part))

    def _form_no_batch(self, reason: str) -> None:
        """Tell the ranks that wait for the next batch that they have to stop; those in a step are told after it.

        A step of which parts are missing is given up when all ranks wait for the next part.
        """
        training, ranks = self.training, self.learner_ranks
        if training.batch and (training.batch_is_whole or not ranks.all_wait_for(training.step, training.next_part)):
            return
        training.batch = None  # its groups are still in the buffer
        for rank, (step, _) in ranks.requested.items():
            self._send(ranks.ranks[rank].member, wire.NoBatch(step=step, reason=reason))
        ranks.requested.clear()

    def _refuse_step(self, rank: int, step: int) -> None:
        del self.learner_ranks.requested[rank]
        reason = (
            f"the learner requests a batch of step {step}, but the hub is at step {self.training.step}: "
            "send Restore with the hub state of the checkpoint first"
        )
        self._refuse(self.learner_ranks.ranks[rank].member, reason)

    def _lease_tasks(self) -> None:
        """Lease tasks of evaluation until it has its share, then of training; what training leaves is evaluation's."""
        credits = sum(actor.credit for actor in self.actors.values())
        held = [len(leases.running) for leases in self._lease_tables]
        kept = self._kept_back()
        for work, limit in (
            (self.evaluation, evaluation_limit(self.run.evaluation.share, leases=credits + sum(held))),
            (self.training, math.inf),
            (self.evaluation, math.inf),
        ):
            while (
                len(work.leases.running) < limit
                and (work is not self.training or self.training.leasable > kept)
                and (lowest := work.lowest_version()) is not None
                and (actor := self.actors.pick(lowest))
            ):
                self._lease_to(actor, work, lowest)

    def _kept_back(self) -> int:
        """How many training tasks are kept for actors that are about to serve the newest weights.

        An actor that is more than one version behind is slow or hangs: nothing is kept for it.
        """
        lowest = self.training.lowest_version()
        if lowest is None or self.now - self.published_at > FAIR_S:
            return 0
        present = [actor for actor in self.actors.values() if actor.welcomed and actor.return_by is None]
        ready = sum(actor.credit for actor in present if actor.version >= lowest)
        coming = sum(actor.credit for actor in present if actor.version == lowest - 1 >= 0)
        return kept_back(
            tasks=self.training.leasable + self.leased_since, ready=ready + self.leased_since, coming=coming
        )

    def _lease_to(self, actor: Actor, work: Training | Evaluation, lowest: int) -> None:
        actor.credit -= 1
        self.leased_since += work is self.training
        lease = work.lease(actor.member, min_version=lowest, now=self.now)
        report_s = max(self.run.hub.progress_s, len(self.actors) / REPORTS_PER_S)
        self._send(actor.member, replace(lease, report_s=report_s))

    def _interrupted(self, reason: str, *, at_once: bool) -> None:
        """End the run; let the learner write a checkpoint, unless the hub has to end `at_once`."""
        if not self.interrupted:
            self.interrupted = True
            self.ranks_until = self.now + CHECKPOINT_GRACE_S
            for rank in self.learner_ranks.ranks.values():
                self._send(rank.member, wire.Stop(reason=reason))
            if self.learner_ranks.any_since(self.now - SILENT_S) and not at_once:
                wait = f"waiting up to {CHECKPOINT_GRACE_S:g} s until the learner has written a checkpoint"
                self._effects.append(Warn(f"{reason}: {wait}; a second signal ends the hub at once"))
        if at_once:
            self.ranks_until = self.now
        self._begin_close(reason, grace=INTERRUPT_GRACE_S)

    def _begin_close(self, reason: str, *, grace: float) -> None:
        """Tell the actors to stop, and shut down after at most `grace` seconds; the first reason is kept."""
        deadline = self.now + grace
        if self.closing is None:
            for actor in self.actors.values():
                self._send(actor.member, wire.Stop(reason=reason))
        else:
            reason, deadline = self.closing[0], min(self.closing[1], deadline)
        self.closing = (reason, deadline)

    def _shut_down(self, reason: str, deadline: float) -> None:
        """Shut down once all members have left, or at the deadline."""
        if (self.actors or self.learner_ranks.ranks) and self.now < deadline:
            return
        if self.learner_ranks.any_since(self.now - SILENT_S) and self.now < self.ranks_until:
            return
        self._effects += [CloseSender(member) for member in self.actors]
        self._effects.append(Shutdown(reason))
        self.closed = True

    # ---- send, refuse, reject

    def _send(self, member: bytes, message: wire.Message) -> None:
        self._effects.append(Send(member, message))

    def _refuse(self, member: bytes, reason: str, *, final: bool = False) -> None:
        self._send(member, wire.Refused(reason=reason, final=final))

    def _forbid(self, member: bytes, reason: str) -> None:
        """Refuse a message that only the learner may send. Log the first one: who sends it could fill the disk."""
        self.refused += 1
        if not self.forbidden:
            self._effects.append(Warn(f"a message was refused: {reason}"))
        self.forbidden = True
        self._refuse(member, reason, final=True)

    def _reject(self, member: bytes, reason: str, *, detail: str = "") -> None:
        """Count an invalid message. An actor that has sent MAX_INVALID of them is refused for good."""
        self.rejected[reason] += 1
        # Everybody can read the status, and an identity is as good as a password (`transport.router`).
        sender = xxhash.xxh3_64_hexdigest(member)[:8]
        self.last_rejection = f"{sender}: {reason}" + (f" ({detail})" if detail else "")
        actor = self.actors.get(member)
        if actor is None:
            return
        actor.invalid += 1
        if actor.invalid >= MAX_INVALID:
            self._quarantine(actor, f"{MAX_INVALID} invalid messages, the last one: {reason}")

    def _quarantine(self, actor: Actor, reason: str) -> None:
        """Refuse this actor for good. Other actors start its tasks from nothing."""
        self.quarantined[owner_of(actor.member), actor.name] = reason
        self._effects.append(Warn(f"{actor.name} is quarantined after {reason}"))
        for leases in self._lease_tables:
            for number in leases.held_by(actor.member):
                leases.forget(number)
        self._refuse(actor.member, f"quarantined after {reason}; check its engine and its model", final=True)
        self._lose_actor(actor, f"quarantined after {reason}")


def _belongs(member: bytes, who: bytes) -> bool:
    """Whether `who` is this member, or the public key that it has."""
    return who in (member, owner_of(member))


def _key(member: bytes, message: Sample) -> tuple[Any, ...]:
    """What a repeated message has in common with the first one, and a score with the earlier ones of its engine."""
    if isinstance(message, wire.Canary):
        return member, message.engine
    lease = member, message.purpose, message.task, message.attempt
    if isinstance(message, wire.Rollout):
        return *lease, message.slot
    return *lease, tuple((part.slot, part.start) for part in message.partial)
