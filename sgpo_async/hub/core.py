"""The hub's core: a deterministic state machine without I/O.

    event ──▶ handle ── 1. note what happened (one handler per kind of event or message)
                     ── 2. settle: let the rules act on what is now so
                              evaluation rounds ▸ stale groups ▸ batch ▸ leases ▸ end of the run
                     ── 3. check both ledgers ──▶ effects

Time enters as an argument and nothing waits here; whatever depends on time is looked at when a Tick comes. The same
events give the same effects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sgpo_async.config import Run, to_plain
from sgpo_async.errors import HubError
from sgpo_async.hub import events as ev
from sgpo_async.hub import snapshot
from sgpo_async.hub.actors import Actor, Actors
from sgpo_async.hub.evaluation import Evaluation
from sgpo_async.hub.events import CloseSender, Effect, Event, OpenSender, Send, Shutdown
from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.hub.status import status
from sgpo_async.hub.training import Training
from sgpo_async.hub.validation import other_tokenizer, refusal
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire import records as wire

if TYPE_CHECKING:
    from sgpo_async.tasks.base import ProblemSource
    from sgpo_async.tasks.benchmarks import Benchmark

FINISH_GRACE_S = 5.0  # members have so long to say goodbye when the run is over
INTERRUPT_GRACE_S = 0.5  # ... and when the hub is told to end


class HubCore:
    """Members, work and rules of one run."""

    def __init__(
        self,
        run: Run,
        source: ProblemSource,
        *,
        benchmarks: Sequence[Benchmark] = (),
        store: str = "",
        now: float = 0.0,
    ) -> None:
        """`store` is the path of the weight store that learners are told."""
        self.run, self.store = run, store
        self.now = self.started = now
        task_sampler = TaskSampler(run, source, benchmarks)
        self.training, self.evaluation = Training(run, task_sampler), Evaluation(task_sampler)
        self.actors, self.learner_ranks = Actors(), LearnerRanks()
        self.published = -1  # newest version in the weight store
        self.tokenizer = ""  # fingerprint of the first learner: it decides for all
        self.rejected: Counter[str] = Counter()  # messages by reason
        self.last_rejection = ""
        self.refused = 0  # Hellos
        self.closing: tuple[str, float] | None = None  # reason and deadline
        self.closed = False
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event at `now` (monotonic seconds); return what is to be done, in order."""
        self.now, self._effects = now, []
        if not self.closed:
            self._note(event)
            self._settle()
            self.training.leases.check()
            self.evaluation.leases.check()
        return self._effects

    def status(self) -> dict[str, Any]:
        """How the run stands; see `sgpo_async.hub.status` for the keys."""
        return status(self)

    # ---- 1. what happened

    def _note(self, event: Event) -> None:
        match event:
            case ev.Received(member, message):
                self._received(member, message)
            case ev.Rejected(member, reason):
                self._reject(member, "malformed message", detail=reason)
            case ev.SenderUp(member, host, port):
                self._link_up(member, host, port)
            case ev.SenderDown(member, reason):
                self._link_down(member, reason)
            case ev.Tick():
                self._expire()
            case ev.Interrupted(reason):
                self._close(reason, grace=INTERRUPT_GRACE_S)

    def _received(self, member: bytes, message: wire.Message) -> None:
        rank = self.learner_ranks.rank_of(member)
        match message:
            case wire.StatusRequest():
                self._send(member, wire.Status(status=self.status()))
            case wire.SettingsRequest():
                self._send(member, wire.Settings(settings=to_plain(self.run)))
            case wire.Hello():
                self._hello(member, message)
            case wire.Rollout():
                self._rollout(member, message)
            case _ if member in self.actors:
                self._from_actor(self.actors[member], message)
            case _ if rank is not None:
                self._from_rank(rank, message)
            case wire.Goodbye():
                pass  # it was given up already
            case _:
                self._refuse(member, "not a member, or not any more: say Hello")

    def _from_actor(self, actor: Actor, message: wire.Message) -> None:
        actor.seen = self.now
        match message:
            case wire.Ready():
                self._ready(actor, message)
            case wire.Heartbeat():
                self._heartbeat(actor, message)
            case wire.Release():
                self._release(actor, message)
            case wire.Goodbye():
                self._lose_actor(actor)
            case _:
                self._reject(actor.member, f"{type(message).__name__} from an actor")

    def _from_rank(self, rank: int, message: wire.Message) -> None:
        self.learner_ranks.ranks[rank].seen = self.now
        match message:
            case wire.Heartbeat():
                pass  # it has been seen
            case wire.BatchRequest(step=step):
                self._batch_request(rank, step)
            case wire.Goodbye():
                self._lose_rank(rank)
            case _ if rank == 0:
                self._from_first_rank(self.learner_ranks.ranks[0].member, message)
            case _:
                self._reject(self.learner_ranks.ranks[rank].member, f"{type(message).__name__} from rank above 0")

    def _from_first_rank(self, member: bytes, message: wire.Message) -> None:
        match message:
            case wire.Commit(step=step):
                self._commit(member, step)
            case wire.Published(version=version):
                self._publish(member, version)
            case wire.Evaluate(version=version):
                self._evaluate(member, version)
            case wire.SnapshotRequest(step=step):
                self._snapshot(member, step)
            case wire.Restore(state=state):
                self._restore(member, state)
            case wire.Finish(reason=reason):
                self._close(reason, grace=FINISH_GRACE_S)
            case _:
                self._reject(member, f"{type(message).__name__} from a learner")

    # ---- members come and go

    def _hello(self, member: bytes, hello: wire.Hello) -> None:
        opens = hello.role == "learner" and self.learner_ranks.opens_new(member, hello)
        joined = self.learner_ranks if hello.role == "learner" and not opens else None
        taken = self._names_besides(member, ranks=not opens)
        alien = other_tokenizer(hello.name, hello.tokenizer, learners=self.tokenizer)
        reason = alien or refusal(hello, taken=taken, world=joined)
        if self.closing and hello.role == "actor":
            self._send(member, wire.Stop(reason=self.closing[0]))  # it came too late, which is no fault of its own
            return
        if self.closing or reason:
            self.refused += 1
            self._refuse(member, reason or "the run is over", final=bool(alien))
            return
        if hello.role == "learner":
            self._rank_joins(member, hello, opens=opens)
        else:
            self._actor_joins(member, hello)

    def _names_besides(self, member: bytes, *, ranks: bool) -> set[str]:
        actors = {actor.name for actor in self.actors.values() if actor.member != member}
        held = self.learner_ranks.ranks.values() if ranks else ()
        return actors | {rank.name for rank in held if rank.member != member}

    def _actor_joins(self, member: bytes, hello: wire.Hello) -> None:
        known = self.actors.get(member)
        if known and not known.welcomed:
            return  # it repeats itself while its link is being made
        if known:
            self._lose_actor(known)
        self.actors.join(member, hello.name, now=self.now, tokenizer=hello.tokenizer)
        self._effects.append(OpenSender(member, hello.name))

    def _link_up(self, member: bytes, host: str, port: int) -> None:
        if member not in self.actors:
            self._effects.append(CloseSender(member))
            return
        actor = self.actors[member]
        actor.welcomed, actor.seen = True, self.now
        self._send(member, wire.Welcome(session_host=host, session_port=port))

    def _link_down(self, member: bytes, reason: str) -> None:
        actor = self.actors.get(member)
        if actor:
            self._refuse(member, f"the session ended: {reason}")
            self._lose_actor(actor)

    def _lose_actor(self, actor: Actor) -> None:
        for leases in (self.training.leases, self.evaluation.leases):
            for number in leases.held_by(actor.member):
                leases.revoke(number, "lease_lost")
        self.actors.leave(actor.member)
        self._effects.append(CloseSender(actor.member))

    def _rank_joins(self, member: bytes, hello: wire.Hello, *, opens: bool) -> None:
        self._settle_tokenizer(hello.tokenizer)
        if opens:
            self.training.batch = None  # its groups are in the buffer still
            for old in self.learner_ranks.reopen(hello.world_size):
                if old.member != member:
                    self._refuse(old.member, f"{hello.name} began a new learner world")
        self.learner_ranks.join(member, hello, now=self.now)
        self._send(member, wire.Welcome(store=self.store, version=self.training.version))

    def _settle_tokenizer(self, fingerprint: str) -> None:
        """The first learner's decides; actors that came before it and differ have to go."""
        self.tokenizer = self.tokenizer or fingerprint
        for actor in list(self.actors.values()):
            if alien := other_tokenizer(actor.name, actor.tokenizer, learners=self.tokenizer):
                self.refused += 1
                self._refuse(actor.member, alien, final=True)
                self._lose_actor(actor)

    def _lose_rank(self, rank: int) -> None:
        self.learner_ranks.leave(rank)
        if rank == 0:  # only rank 0 can commit; the others may leave between their last step and its Commit
            self.training.batch = None

    def _expire(self) -> None:
        """Silence is a slow sign of death, since an actor's one thread may load weights; its link is the fast one."""
        overdue, oldest = self.now - self.run.hub.lease_timeout_s, self.now - self.run.learner.batch_timeout_s
        for actor in self.actors.silent_since(overdue):
            self._lose_actor(actor)
        for rank in [r for r, held in self.learner_ranks.ranks.items() if held.seen < oldest]:
            self._lose_rank(rank)
        for leases in (self.training.leases, self.evaluation.leases):
            for number in leases.silent_since(overdue):
                leases.revoke(number, "lease_timeout")

    # ---- actors at work

    def _ready(self, actor: Actor, ready: wire.Ready) -> None:
        if ready.tasks < 0:
            self._reject(actor.member, "Ready for less than nothing", detail=str(ready.tasks))
            return
        actor.credit += ready.tasks
        actor.version = self._known(ready.version)

    def _heartbeat(self, actor: Actor, heartbeat: wire.Heartbeat) -> None:
        self.actors.read(actor, heartbeat)
        actor.version = self._known(heartbeat.version)
        for leases in (self.training.leases, self.evaluation.leases):
            leases.hear_of(actor.member, heartbeat.tasks, now=self.now)

    def _known(self, version: int) -> int:
        """-1 if it cannot be of this run: an engine may still be warm with the weights of another."""
        return version if version <= self.training.version else -1

    def _release(self, actor: Actor, release: wire.Release) -> None:
        if release.servable:
            actor.credit = 0  # who gives work back takes no more until it is Ready again
        leases = self.training.leases if release.task >= 0 else self.evaluation.leases
        lease = leases.running.get(release.task)
        if lease is None or (lease.member, lease.attempt) != (actor.member, release.attempt):
            return
        if release.servable:
            leases.revoke(release.task, "released")
        else:
            leases.discard(release.task, "unservable")

    def _rollout(self, member: bytes, rollout: wire.Rollout) -> None:
        self._send(member, wire.Ack(task=rollout.task, attempt=rollout.attempt, slot=rollout.slot))
        if member in self.actors:
            self.actors[member].seen = self.now
        work = self.training if rollout.purpose == "train" else self.evaluation
        lease = work.leases.awaits(member, rollout)
        if lease is None:
            self._unawaited(member, rollout)
        elif fault := lease.misfit(rollout, newest=self.training.version):
            self._reject(member, fault, detail=f"task {rollout.task}, slot {rollout.slot}")
            work.leases.reject(rollout.task)
        else:
            work.leases.arrive(rollout, now=self.now)

    def _unawaited(self, member: bytes, rollout: wire.Rollout) -> None:
        """A duplicate, or a late one of a lost lease or of a past before a Restore; or of no task at all."""
        work = self.training if rollout.purpose == "train" else self.evaluation
        if work.dispatched(rollout.task) or rollout.attempt < work.leases.first_attempt:
            work.leases.duplicates += 1
        else:
            self._reject(member, "rollout of an unknown task", detail=f"{rollout.purpose} {rollout.task}")

    # ---- the learner at work

    def _batch_request(self, rank: int, step: int) -> None:
        if step <= self.learner_ranks.served:
            return  # a repetition that was long on its way
        self.learner_ranks.asked[rank] = step
        if self.training.batch and step == self.training.step:
            self._send(self.learner_ranks.ranks[rank].member, self.training.shard(rank))  # it asks again

    def _commit(self, member: bytes, step: int) -> None:
        if self.training.batch and step == self.training.step:
            self.training.commit()
            self.learner_ranks.committed(step)
        if step == self.training.step - 1:  # now, or before: the answer may have been lost
            self._send(member, wire.Committed(step=step, status=self.status()))
        else:
            self._refuse(member, f"no batch of step {step} is out; the hub is at {self.training.step}")

    def _publish(self, member: bytes, version: int) -> None:
        if not self.published <= version <= self.training.version:
            self._reject(member, "Published out of order", detail=f"{version} after {self.published}")
            return
        self.published = version
        if not self.evaluation.begun:
            self.evaluation.ask(version)  # where the run starts from

    def _evaluate(self, member: bytes, version: int) -> None:
        if version > self.training.version:
            self._reject(member, "Evaluate of a version that does not exist", detail=str(version))
        elif result := self.evaluation.ask(version):
            self._deliver(member, result)

    def _deliver(self, member: bytes, result: wire.Evaluated) -> None:
        self._send(member, result)
        self.evaluation.delivered(result.version)

    def _snapshot(self, member: bytes, step: int) -> None:
        if step != self.training.step:
            reason = f"a snapshot of step {step} was asked for; the hub is at {self.training.step}"
            self._refuse(member, reason)
            return
        self._send(member, wire.Snapshot(step=step, state=snapshot.dump(self.training, self.evaluation)))

    def _restore(self, member: bytes, state: bytes) -> None:
        try:
            restored = snapshot.load(state, training=self.training, evaluation=self.evaluation)
        except HubError as error:
            self._refuse(member, str(error))
            return
        self.training, self.evaluation = restored
        self._send(member, wire.Restored(version=self.training.version))

    # ---- 2. what follows

    def _settle(self) -> None:
        result = self.evaluation.advance(self.training.version)
        if result and 0 in self.learner_ranks.ranks:
            self._deliver(self.learner_ranks.ranks[0].member, result)
        self.training.drop_stale()
        if self.closing is None:
            self._form_batch()
            self._lease()
        else:
            self._end(*self.closing)

    def _form_batch(self) -> None:
        if self.training.batch or not self.learner_ranks.all_asked:
            return
        for rank, step in list(self.learner_ranks.asked.items()):
            if step != self.training.step:
                self._refuse_step(rank, step)
        if self.learner_ranks.all_asked and self.training.form(self.learner_ranks.size):
            for rank, held in sorted(self.learner_ranks.ranks.items()):
                self._send(held.member, self.training.shard(rank))

    def _refuse_step(self, rank: int, step: int) -> None:
        del self.learner_ranks.asked[rank]
        here = self.training.step
        reason = f"the learner asks for step {step} but the hub is at {here}: Restore the checkpoint's state first"
        self._refuse(self.learner_ranks.ranks[rank].member, reason)

    def _lease(self) -> None:
        for work in (self.evaluation, self.training):
            while (lowest := work.lowest_version()) is not None and (actor := self.actors.pick(lowest)):
                actor.credit -= 1
                self._send(actor.member, work.lease(actor.member, min_version=lowest, now=self.now))

    def _close(self, reason: str, *, grace: float) -> None:
        deadline = self.now + grace
        if self.closing is None:
            for actor in self.actors.values():
                self._send(actor.member, wire.Stop(reason=reason))
        else:
            reason, deadline = self.closing[0], min(self.closing[1], deadline)
        self.closing = (reason, deadline)

    def _end(self, reason: str, deadline: float) -> None:
        if (self.actors or self.learner_ranks.ranks) and self.now < deadline:
            return
        self._effects += [CloseSender(member) for member in self.actors]
        self._effects.append(Shutdown(reason))
        self.closed = True

    # ---- words

    def _send(self, member: bytes, message: wire.Message) -> None:
        self._effects.append(Send(member, message))

    def _refuse(self, member: bytes, reason: str, *, final: bool = False) -> None:
        self._send(member, wire.Refused(reason=reason, final=final))

    def _reject(self, member: bytes, reason: str, *, detail: str = "") -> None:
        """Count a message that makes no sense; it costs nobody anything else."""
        self.rejected[reason] += 1
        self.last_rejection = f"{member.hex()}: {reason}" + (f" ({detail})" if detail else "")
