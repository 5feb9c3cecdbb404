"""A whole run in virtual time: the hub's real core, simulated nodes and a simulated learner.

    nodes ── messages ──▶ HubCore ── messages ──▶ learner
      ▲                                             │ Published, after the time that weights need
      └─────────────────── versions ────────────────┘

The core's leases, admission, staleness rules, batches and ledger are those of a real run. Only time is not real: it
jumps to when something happens next. So a run of hours on hundreds of nodes takes seconds, and the same settings and
seed give the same result.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sgpo_async.config import Hub, Run
from sgpo_async.config.schema import Evaluation, Learner, Local, Rollout, Tasks
from sgpo_async.errors import SgpoError
from sgpo_async.hub import HubCore
from sgpo_async.hub.events import OpenSender, Received, Send, SenderUp, Tick
from sgpo_async.simulation.learner import SimulatedLearner
from sgpo_async.simulation.node import Node, Updates
from sgpo_async.simulation.rates import EngineRates, LearnerRates, Lengths
from sgpo_async.simulation.workload import Workload
from sgpo_async.tasks.sources import source_of
from sgpo_async.wire import records as wire

FOREVER_S = 1e9
REPORT_S = 20.0  # often enough for the rules of staleness; more often would only cost time of the simulation
LEARNER = b"learner"  # all ranks together
EVENTS = 50_000_000  # of one simulation: an error in it must not run for ever


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One simulated run."""

    nodes: int
    engine: EngineRates
    learner: LearnerRates
    lengths: Lengths
    problems: int = 128  # of a step
    autonomous: int = 8
    guided: int = 4
    max_lag: int = 2
    stale: str = "correct"
    batches_in_flight: int = 0
    updates: Updates = "in-flight"
    steps: int = 20  # that are measured
    warm: int = 0  # steps before them; 0: until the longest rollouts of the start are trained
    seed: int = 0

    @property
    def size(self) -> int:
        """Rollouts of a problem."""
        return self.autonomous + self.guided


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened in the measured steps."""

    settings: Settings = field(repr=False)
    seconds: float
    steps: int
    trained_tokens: int  # sampled tokens of the trained groups
    generated_tokens: float
    learner: dict[str, float]  # share of its time by what it did
    engines: dict[str, float]  # share of all slots' time by why they were free; "busy" if they were not
    empty: float  # share of the nodes' time without any sequence
    lag: dict[int, float]  # share of trained tokens by lag
    dropped: int  # rollouts

    @property
    def tokens_per_s(self) -> float:
        """Effective throughput: sampled tokens that were trained."""
        return self.trained_tokens / self.seconds

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.seconds / self.steps

    @property
    def mean_lag(self) -> float:
        """Mean age of a trained token in versions."""
        return sum(lag * share for lag, share in self.lag.items())

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "step_s": self.step_s,
            "mean_lag": self.mean_lag,
            "learner": self.learner,
            "engines": self.engines,
            "empty": self.empty,
            "lag": {str(lag): share for lag, share in self.lag.items()},
            "dropped": self.dropped,
        }


def simulate(settings: Settings) -> Outcome:
    """Simulate a run. The steps in which the cluster fills and empties are not measured."""
    return World(settings).run()


class World:
    """Nodes and learner around one core."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.now = settings, 0.0
        self._warm = settings.warm or 2 * settings.max_lag + 4
        self.core = HubCore(run := run_of(settings, steps=self._warm + settings.steps + 2 * settings.max_lag + 4),
                            source_of(run), store="/store")  # fmt: skip
        workload = Workload(settings.lengths, size=settings.size, seed=settings.seed)
        names = (f"node-{i}" for i in range(settings.nodes))
        self.nodes = {
            name.encode(): Node(name, settings.engine, workload, size=settings.size, updates=settings.updates)
            for name in names
        }
        self.learner = SimulatedLearner(settings.learner)
        self._ranks = {_rank(rank): rank for rank in range(settings.learner.ranks)}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._due: dict[bytes, float] = {}
        self._inbox: deque[tuple[bytes, wire.Message]] = deque()

    def run(self) -> Outcome:
        """Train to the last measured step."""
        self._at(REPORT_S, self._report)
        self._settle(*self.nodes, LEARNER)
        begun, dropped = 0.0, 0
        for _ in range(EVENTS):
            step = self.core.training.step
            if not begun and step >= self._warm:
                self._cut()
                begun, dropped = self.now, self._dropped()
            if step >= self._warm + self.settings.steps:
                return self._outcome(self.now - begun, self._dropped() - dropped)
            if not self._heap:
                raise SgpoError(f"the simulation stands still at step {step}: {self.core.status()}")
            self.now, _, action = heapq.heappop(self._heap)
            action()
        raise SgpoError(f"the simulation has not reached its last step after {EVENTS} events")

    # ---- events

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._order), action))

    def _wake(self, member: bytes, due: float) -> None:
        """A member is due, unless that has changed since."""
        if self._due.get(member) == due:
            del self._due[member]
            (self.learner if member == LEARNER else self.nodes[member]).advance(self.now)
            self._settle(member)

    def _arrive(self, version: int) -> None:
        for node in self.nodes.values():
            node.offer(version, self.now)
        self._settle(*self.nodes)

    def _report(self) -> None:
        for node in self.nodes.values():
            node.report(self.now)
        self._handle(Tick())
        self._settle(*self.nodes)
        self._at(self.now + REPORT_S, self._report)

    def _open(self, member: bytes) -> None:
        self._handle(SenderUp(member, "127.0.0.1", 1))
        self._settle()

    def _settle(self, *members: bytes) -> None:
        """Deliver what these members send, what the hub answers, and so on; note when those concerned are due next."""
        talking, concerned = deque(members), dict.fromkeys(members)
        while talking or self._inbox:
            if self._inbox:
                member, message = self._inbox.popleft()
                member = self._give(member, message)
                concerned[member] = None
                talking.append(member)
            else:
                self._hear(talking.popleft())
        for member in concerned:
            due = (self.learner if member == LEARNER else self.nodes[member]).due
            if due < math.inf and self._due.get(member) != due:
                self._due[member] = due
                self._at(due, partial(self._wake, member, due))

    def _give(self, member: bytes, message: wire.Message) -> bytes:
        """Give a member what the hub has sent; return who it belongs to."""
        if isinstance(message, wire.Refused):
            raise SgpoError(f"the hub refuses {member.decode()} in the simulation: {message.reason}")
        if (rank := self._ranks.get(member)) is not None:
            self.learner.take(rank, message, self.now)
            return LEARNER
        self.nodes[member].take(message, self.now)
        return member

    def _hear(self, member: bytes) -> None:
        """Give the hub what a node or the learner sends."""
        if member != LEARNER:
            sent, self.nodes[member].outbox = self.nodes[member].outbox, []
            for message in sent:
                self._handle(Received(member, message))
            return
        said, self.learner.outbox = self.learner.outbox, []
        for rank, message in said:
            self._handle(Received(_rank(rank), message))
            if isinstance(message, wire.Published):
                self._at(self.now + self.settings.learner.arrive_s, partial(self._arrive, message.version))

    def _handle(self, event: Any) -> None:
        for effect in self.core.handle(event, self.now):
            match effect:
                case Send(member, message):
                    self._inbox.append((member, message))
                case OpenSender(member):
                    self._at(self.now, partial(self._open, member))

    # ---- what is measured

    def _dropped(self) -> int:
        return sum(self.core.training.leases.rollouts.dropped.values())

    def _cut(self) -> list[Any]:
        self.learner.advance(self.now)
        for node in self.nodes.values():
            node.advance(self.now)
        return [self.learner.cut(), *(node.cut() for node in self.nodes.values())]

    def _outcome(self, seconds: float, dropped: int) -> Outcome:
        (spent, lag, trained), *nodes = self._cut()
        slots = {"busy": sum(busy for _, busy, *_ in nodes)}
        for found, *_ in nodes:
            for cause, one in found.items():
                slots[cause] = slots.get(cause, 0.0) + one
        all_slots = sum(slots.values())
        tokens = sum(lag.values())
        return Outcome(
            settings=self.settings,
            seconds=seconds,
            steps=self.settings.steps,
            trained_tokens=trained,
            generated_tokens=sum(found[3] for found in nodes),
            learner={phase: one / seconds for phase, one in spent.items() if one > 0},
            engines={cause: one / all_slots for cause, one in slots.items() if one > 0},
            empty=sum(found[2] for found in nodes) / (seconds * len(nodes)),
            lag={age: count / tokens for age, count in sorted(lag.items())},
            dropped=dropped,
        )


def _rank(number: int) -> bytes:
    return f"rank-{number}".encode()


def run_of(settings: Settings, *, steps: int) -> Run:
    """The configuration of the simulated run's hub."""
    return Run(
        steps=steps,
        seed=settings.seed,
        tasks=Tasks(held_out=1),
        rollout=Rollout(
            autonomous=settings.autonomous, guided=settings.guided, max_new_tokens=settings.lengths.longest
        ),
        learner=Learner(problems_per_step=settings.problems, batch_timeout_s=FOREVER_S),
        hub=Hub(
            max_lag=settings.max_lag,
            stale=settings.stale,  # type: ignore[arg-type]
            batches_in_flight=settings.batches_in_flight,
            lease_timeout_s=FOREVER_S,
            stall_s=FOREVER_S,
            max_message_mb=2**20,
        ),
        evaluation=Evaluation(every=10**6),
        local=Local(ranks=settings.learner.ranks),
    )


ALONE_LAG = 8  # so many batches ahead, slots never lack work


def generation_bound(settings: Settings) -> Outcome:
    """The same nodes with a learner that takes no time: how fast generation alone is."""
    instant = replace(settings.learner, token_s=1e-12, step_s=0.0, publish_s=0.0, arrive_s=0.0, switch_s=0.0,
                      checkpoint_every=0, ranks=1)  # fmt: skip
    engine = replace(settings.engine, load_s=0.0)
    return simulate(replace(settings, learner=instant, max_lag=ALONE_LAG, engine=engine, updates="in-flight"))
