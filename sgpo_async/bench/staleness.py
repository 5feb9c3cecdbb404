"""What staleness costs at real lengths: the hub's own core with a virtual clock, simulated servers and learner.

    simulated servers ── leases, reports, rollouts ──▶ HubCore ── shards ──▶ simulated learner, a step every S seconds

A cluster of 128 servers works for a learner of 128 problems a step, each with 8 + 4 rollouts of lognormal length, 3 %
of which are cut at 16,384 tokens. A server takes over new weights in flight. Lengths and rewards belong to the task, so
every rule meets the same ones; longer completions are correct less often.

For each rule the table has the share of groups and of generated tokens that are dropped, how much shorter or more often
correct the trained rollouts are than all rollouts of the same tasks (with the 95 % interval of random drops), the share
of trained tokens older than hub.max_lag, and the steps per hour.

    python -m sgpo_async.bench.staleness [--step-s 10 30 60] [--steps 30]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np

from sgpo_async.bench.division import LONGEST, SIGMA, location
from sgpo_async.config import Hub, Run
from sgpo_async.config.schema import Learner, Rollout, Tasks
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.events import OpenSender, Received, Send, SenderUp, Tick
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import derived_seed
from sgpo_async.wire import records as wire

UNIT = 64  # tokens that one simulated token stands for
AUTONOMOUS, GUIDED, BATCH = 8, 4, 128
SERVERS, TASKS_PER_SERVER, TOKENS_PER_S = 128, 4, 80.0  # tokens per second of one sequence
LOAD_S = 2.0  # from a publication to the servers' new weights
REPORT_S = 20.0  # more often would only cost time of the simulation
FOREVER_S = 1e9
LEARNER = b"learner"
RULES: dict[str, dict[str, Any]] = {
    "drop": {"stale": "drop"},
    "mask": {"stale": "mask"},
    "correct": {"stale": "correct"},
    "correct, more in flight": {"stale": "correct", "batches_in_flight": 16},
    "correct, begun first": {"stale": "correct", "batch_from": "begun", "batches_in_flight": 16},
}


def main() -> None:
    """Simulate and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step-s", type=float, nargs="+", default=[10.0, 30.0, 60.0])
    parser.add_argument("--steps", type=int, default=30, help="steps whose tasks are measured")
    parser.add_argument("--max-lag", type=int, default=2)
    args = parser.parse_args()
    found = []
    print(f"{'step':>5}  {'rule':24}{'dropped: groups':>16}{'tokens':>8}{'length bias':>18}{'pass bias':>18}"
          f"{'stale':>7}{'lag':>6}{'steps/h':>9}")  # fmt: skip
    for step_s, (name, hub) in itertools.product(args.step_s, RULES.items()):
        row = simulate(step_s=step_s, steps=args.steps, max_lag=args.max_lag, **hub)
        found.append({"step_s": step_s, "rule": name, **row})
        biases = [f"{row[key]:+.1%} ± {row[key + '_interval']:.1%}" for key in ("length_bias", "pass_bias")]
        dropped = f"{row['groups_dropped']:16.1%}{row['tokens_dropped']:8.1%}"
        rest = f"{row['stale']:7.1%}{row['lag']:6.1f}{row['steps_per_hour']:9.0f}"
        print(f"{step_s:4g}s  {name:24}{dropped}{biases[0]:>18}{biases[1]:>18}{rest}", flush=True)
    print(json.dumps(found))


def simulate(*, step_s: float, steps: int, max_lag: int, **hub: Any) -> dict[str, float]:
    """One rule. The first tasks and the last ones are not measured: the cluster fills and empties."""
    around = math.ceil(LONGEST / TOKENS_PER_S / step_s) + 2 * max_lag + 2  # steps in which the longest rollout ends
    cluster = Cluster(steps=steps + 3 * around, step_s=step_s, max_lag=max_lag, hub=hub)
    cluster.run()
    return cluster.measured(range(BATCH * around, BATCH * (around + steps)))


@dataclass(order=True)
class Running:
    """One rollout that a server generates."""

    key: tuple[int, int, int]  # task, attempt, slot
    server: Server = field(compare=False)
    begun: float = field(compare=False)
    before: np.ndarray = field(compare=False)  # versions of the tokens that earlier attempts have sampled
    length: int = field(compare=False)
    reported: int = field(compare=False, default=0)

    @property
    def ends(self) -> float:
        """When it is finished."""
        return self.begun + (self.length - len(self.before)) * UNIT / TOKENS_PER_S

    def versions(self, now: float) -> np.ndarray:
        """The version of each token that is sampled until `now`."""
        own = int((now - self.begun) * TOKENS_PER_S / UNIT + 1e-6)
        count = max(min(own, self.length - len(self.before)), 0)
        times = self.begun + (np.arange(count) + 1) * UNIT / TOKENS_PER_S
        changes, versions = self.server.changes
        own_versions = np.array(versions, np.int32)[np.searchsorted(changes, times, side="left") - 1]
        return np.concatenate((self.before, own_versions.astype(np.int32)))


class Server:
    """One inference server, an actor of its own."""

    def __init__(self, member: bytes) -> None:
        self.member = member
        self.changes: tuple[list[float], list[int]] = ([-1.0], [0])  # times and versions of the weights
        self.running: dict[tuple[int, int, int], Running] = {}

    @property
    def version(self) -> int:
        """Of its weights."""
        return self.changes[1][-1]


class Cluster:
    """Servers and learner around one core. Events happen at the times of a heap."""

    def __init__(self, *, steps: int, step_s: float, max_lag: int, hub: dict[str, Any]) -> None:
        self.step_s, self.now = step_s, 0.0
        run = Run(
            steps=steps,
            tasks=Tasks(held_out=1),
            rollout=Rollout(autonomous=AUTONOMOUS, guided=GUIDED, max_new_tokens=LONGEST // UNIT),
            learner=Learner(problems_per_step=BATCH, batch_timeout_s=FOREVER_S),
            hub=Hub(max_lag=max_lag, lease_timeout_s=FOREVER_S, stall_s=FOREVER_S, max_message_mb=2**14, **hub),
        )
        self.run_settings = run
        self.core = HubCore(run, source_of(run), store="/store")
        self.servers = {name: Server(name) for name in (f"server-{i}".encode() for i in range(SERVERS))}
        self.inbox: deque[tuple[bytes, wire.Message]] = deque()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self.trained: set[int] = set()
        self.trained_tokens = self.stale_tokens = self.lag_sum = 0
        self.begun_at = self.ended_at = 0.0

    def run(self) -> None:
        """Train to the last step."""
        for name in self.servers:
            self._send(name, wire.Hello(role="actor", name=name.decode()))
        self._send(LEARNER, wire.Hello(role="learner", name="learner"))
        self._at(REPORT_S, self._report)
        while self._heap and self.core.training.step < self.run_settings.steps:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            self._deliver()

    def measured(self, tasks: range) -> dict[str, float]:
        """What became of these tasks."""
        lengths = np.array([[length_of(task, slot) for slot in range(AUTONOMOUS + GUIDED)] for task in tasks]) * UNIT
        correct = np.array([[correct_of(task, slot) for slot in range(AUTONOMOUS)] for task in tasks])
        kept = np.array([task in self.trained for task in tasks])
        found: dict[str, float] = {
            "groups_dropped": 1 - float(kept.mean()),
            "tokens_dropped": 1 - float(lengths[kept].sum() / lengths.sum()),
        }
        for name, values in (("length_bias", lengths.mean(1)), ("pass_bias", correct.mean(1))):
            share, mean = 1 - kept.mean(), values.mean()
            spread = values.std() / math.sqrt(len(values)) * math.sqrt(share / max(1 - share, 1e-9))
            found[name] = float(values[kept].mean() / mean - 1)
            found[f"{name}_interval"] = float(1.96 * spread / mean)
        found["stale"] = self.stale_tokens / self.trained_tokens
        found["lag"] = self.lag_sum / self.trained_tokens
        found["steps_per_hour"] = 3600 * self.core.training.step / self.now
        return found

    # ---- messages

    def _send(self, member: bytes, message: wire.Message) -> None:
        self._handle(Received(member, message))

    def _handle(self, event: Any) -> None:
        for effect in self.core.handle(event, self.now):
            if isinstance(effect, Send):
                self.inbox.append((effect.member, effect.message))
            elif isinstance(effect, OpenSender):
                self._at(0.0, partial(self._handle, SenderUp(effect.member, "127.0.0.1", 1)))

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._count), action))

    def _deliver(self) -> None:
        while self.inbox:
            member, message = self.inbox.popleft()
            if member == LEARNER:
                self._train(message)
            else:
                self._serve(self.servers[member], message)

    # ---- servers

    def _serve(self, server: Server, message: wire.Message) -> None:
        match message:
            case wire.Welcome():
                self._send(server.member, wire.Ready(tasks=TASKS_PER_SERVER, version=server.version))
            case wire.Lease(purpose="evaluate"):
                for slot in range(message.autonomous + message.guided):
                    versions = np.full(1, server.version, np.int32)
                    self._send(server.member, rollout_of(message, slot, versions))
                self._send(server.member, wire.Ready(tasks=1, version=server.version))
            case wire.Lease():
                self._begin(server, message)
            case wire.Revoked():
                for key in [key for key in server.running if key[:2] == (message.task, message.attempt)]:
                    del server.running[key]
                self._send(server.member, wire.Ready(tasks=1, version=server.version))

    def _begin(self, server: Server, lease: wire.Lease) -> None:
        known = {part.slot: np.repeat(part.versions, wire.span_lengths(part.ends)) for part in lease.partial}
        for slot in sorted(set(range(lease.autonomous + lease.guided)) - set(lease.finished.tolist())):
            before = known.get(slot, np.empty(0, np.int32))
            key = (lease.task, lease.attempt, slot)
            own = Running(key, server, self.now, before, length_of(lease.task, slot), len(before))
            server.running[key] = own
            self._at(own.ends - self.now, partial(self._end, own, lease))

    def _end(self, own: Running, lease: wire.Lease) -> None:
        server = own.server
        if server.running.get(own.key) is not own:
            return  # revoked
        del server.running[own.key]
        self._send(server.member, rollout_of(lease, own.key[2], own.versions(self.now + 1.0)))
        if not any(key[:2] == own.key[:2] for key in server.running):
            self._send(server.member, wire.Ready(tasks=1, version=server.version))

    def _report(self) -> None:
        """Every server reports what it has sampled."""
        for server in self.servers.values():
            for (task, attempt), group in itertools.groupby(sorted(server.running.values()), lambda own: own.key[:2]):
                if parts := list(self._parts(group)):
                    progress = wire.Progress(task=task, attempt=attempt, purpose="train", partial=tuple(parts))
                    self._send(server.member, progress)
        self._handle(Tick())
        self._at(REPORT_S, self._report)

    def _parts(self, group: Iterator[Running]) -> Iterator[wire.PartialRollout]:
        for own in group:
            versions = own.versions(self.now)[own.reported :]
            if len(versions) and own.reported + len(versions) < own.length:
                yield wire.PartialRollout(slot=own.key[2], start=own.reported, **arrays(versions))
                own.reported += len(versions)

    def _update(self, version: int) -> None:
        for server in self.servers.values():
            server.changes[0].append(self.now)
            server.changes[1].append(version)
            self._send(server.member, wire.Ready(tasks=0, version=version))

    # ---- learner

    def _train(self, message: wire.Message) -> None:
        match message:
            case wire.Welcome():
                self._publish(0)
            case wire.Shard():
                self.trained |= {rollout.task for rollout in message.rollouts}
                for rollout in message.rollouts:
                    lags = message.version - rollout.token_versions()
                    self.trained_tokens += len(lags)
                    self.stale_tokens += int((lags > self.run_settings.hub.max_lag).sum())
                    self.lag_sum += int(lags.sum())
                self._at(self.step_s, lambda: self._send(LEARNER, wire.Commit(step=message.step)))
            case wire.Committed():
                self._publish(message.step + 1)

    def _publish(self, version: int) -> None:
        self._send(LEARNER, wire.Published(version=version))
        self._at(LOAD_S if version else 0.0, lambda: self._update(version))
        self._send(LEARNER, wire.BatchRequest(step=version))


def length_of(task: int, slot: int) -> int:
    """The length of a rollout in units; half of its variance belongs to the task."""
    own = _normal("length", task, slot) + _normal("length", task)
    return int(np.clip(math.exp(location(LONGEST) + SIGMA * own / math.sqrt(2)) / UNIT, 1, LONGEST // UNIT))


def correct_of(task: int, slot: int) -> bool:
    """Whether a rollout is correct: the longer it is, the less likely."""
    return NormalDist().cdf(_normal("reward", task, slot)) < math.exp(-length_of(task, slot) * UNIT / 6000)


def _normal(*parts: object) -> float:
    uniform = (derived_seed(*map(str, parts)) + 0.5) / 2**56
    return NormalDist().inv_cdf(uniform)


def rollout_of(lease: wire.Lease, slot: int, versions: np.ndarray) -> wire.Rollout:
    """The finished rollout whose tokens have these versions."""
    guided, train = slot >= lease.autonomous, lease.purpose == "train"
    correct = train and correct_of(lease.task, slot)
    cut = len(versions) == lease.max_new_tokens
    return wire.Rollout(
        task=lease.task,
        attempt=lease.attempt,
        slot=slot,
        purpose=lease.purpose,
        guided=guided,
        prompt=np.zeros(1, np.int32),
        reward=float(correct),
        finish="length" if cut else "stop",
        unguided_logprob=-1.0 if lease.unguided_scores and guided and correct and not cut else None,
        **arrays(versions),
    )


def arrays(versions: np.ndarray) -> dict[str, Any]:
    """Tokens, log-probabilities and spans for these versions."""
    count = len(versions)
    last = np.append(versions[1:] != versions[:-1], True)
    return {
        "tokens": np.zeros(count, np.int32),
        "logprobs": np.full(count, -1.0, np.float32),
        "versions": versions[last].astype(np.int32),
        "digests": np.zeros(int(last.sum()), np.int64),
        "ends": (np.flatnonzero(last) + 1).astype(np.int32),
    }


if __name__ == "__main__":
    main()
