"""A simulated learner: all ranks of one world, whose steps take as long as their tokens say (`rates`).

    BatchRequest ─▶ Shard of every rank ─▶ train ─▶ Commit ─▶ Committed ─▶ publish, checkpoint ─▶ BatchRequest
                                                                  └▶ Published ─▶ engines

It does no I/O and has no clock; see `node`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from sgpo_async.simulation.rates import LearnerRates
from sgpo_async.wire import records as wire


def sgpo_tokens(rollouts: tuple[wire.Rollout, ...]) -> float:
    """Autonomous rollouts, and one target of each problem that has any; the teacher's forward counts as a third."""
    total = 0.0
    targets: dict[int, float] = {}
    for one in rollouts:
        if not one.guided:
            total += len(one.prompt) + len(one.tokens)
        elif one.may_be_distilled:
            targets.setdefault(one.task, (4 / 3) * (len(one.prompt) + len(one.tokens)))
    return total + sum(targets.values())


class SimulatedLearner:
    """The ranks of one learner. Times are in seconds."""

    def __init__(self, rates: LearnerRates) -> None:
        self._rates = rates
        self.outbox: list[tuple[int, wire.Message]] = [
            (rank, wire.Hello(role="learner", name=f"rank-{rank}", rank=rank, world_size=rates.ranks))
            for rank in range(rates.ranks)
        ]
        self.spent: dict[str, float] = defaultdict(float)  # seconds by what the learner did
        self.lag: Counter[int] = Counter()  # trained tokens by the age of the weights that sampled them
        self.trained = 0  # sampled tokens in the groups that were trained
        self.step = 0
        self._phase = "starts"
        self._until = math.inf  # end of the phase, if it ends by itself
        self._now = 0.0
        self._shards: dict[int, wire.Shard] = {}
        self._welcomed: set[int] = set()
        self._next_s = 0.0  # how long training will take, once the GPUs have switched to it
        self.version = -1

    def take(self, rank: int, message: wire.Message, now: float) -> None:
        """Process a message of the hub for a rank."""
        self.advance(now)
        match message:
            case wire.Welcome():
                self._welcomed.add(rank)
                if len(self._welcomed) == self._rates.ranks:
                    self._publish(message.version)
                    self._request(0)
            case wire.Shard():
                self._shards[rank] = message
                if len(self._shards) == self._rates.ranks:
                    self._train()
            case wire.Committed():
                self._committed()

    def advance(self, now: float) -> None:
        """Let the time pass."""
        while self._now < now:
            until = min(self._until, now)
            self.spent[self._phase] += until - self._now
            self._now = until
            if until == self._until:
                self._end_phase()

    @property
    def due(self) -> float:
        """When the present phase ends by itself."""
        return self._until

    def cut(self) -> tuple[dict[str, float], Counter[int], int]:
        """Seconds by phase, trained tokens by lag, and sampled tokens, since the last call."""
        found = self.spent, self.lag, self.trained
        self.spent, self.lag, self.trained = defaultdict(float), Counter(), 0
        return found

    def _begin(self, phase: str, seconds: float = math.inf) -> None:
        self._phase, self._until = phase, self._now + seconds

    def _request(self, step: int) -> None:
        self.step = step
        self._shards.clear()
        self._begin("waits for data")
        for rank in range(self._rates.ranks):
            self.outbox.append((rank, wire.BatchRequest(step=step)))

    def _train(self) -> None:
        shards = [self._shards[rank] for rank in range(self._rates.ranks)]
        costs = [sgpo_tokens(shard.rollouts) for shard in shards]
        for shard in shards:
            for one in shard.rollouts:
                self.trained += len(one.tokens)
                for version, count in zip(one.versions, wire.span_lengths(one.ends), strict=True):
                    self.lag[shard.version - int(version)] += int(count)
        seconds = max(costs) * self._rates.token_s + self._rates.step_s
        if self._rates.switch_s:
            self._next_s = seconds
            self._begin("switches", self._rates.switch_s)
        else:
            self._begin("trains", seconds)

    def _end_phase(self) -> None:
        match self._phase:
            case "switches" if self._next_s:
                seconds, self._next_s = self._next_s, 0.0
                self._begin("trains", seconds)
            case "trains" if self._rates.switch_s:
                self._begin("switches", self._rates.switch_s)
            case "trains" | "switches":
                self.outbox.append((0, wire.Commit(step=self.step)))
                self._begin("commits")
            case "publishes":
                every = self._rates.checkpoint_every
                if every and (self.step + 1) % every == 0:
                    self._begin("writes a checkpoint", self._rates.checkpoint_s)
                else:
                    self._request(self.step + 1)
            case "writes a checkpoint":
                self._request(self.step + 1)

    def _committed(self) -> None:
        self._publish(self.version + 1)
        self._begin("publishes", self._rates.publish_s)
        if not self._rates.publish_s:
            self._end_phase()

    def _publish(self, version: int) -> None:
        self.version = version
        self.outbox.append((0, wire.Published(version=version)))
