"""How many inference nodes one hub serves: simulated nodes and a simulated learner over real sockets, a real hub.

    sgpo-async bench scale [--quick] [--to DIR]

    this process: N simulated nodes, each with a socket of its own, and a simulated learner ── ZeroMQ ──▶ hub process

Engines and learner only count tokens (`sgpo_async.simulation`); what they send is what real ones send: leases, reports,
rollouts with all tokens, heartbeats, batches. The learner takes six tenths of what the nodes can generate: without
limits of the hub it trains all the time. "of ceiling" is the share of time in which it does. Halfway through, a quarter
of the nodes leaves in the midst of its work, and as many others join.

Each line also has the hub's CPU time for a rollout, its memory, and how busy this process was: above about 90 %, this
process is the limit and not the hub. Above FULL_SPEED nodes the simulated time passes more slowly, so that this one
process can be all of them; then messages come at the rate of FULL_SPEED nodes, and what is seen is the hub's cost for a
rollout and its memory with so many members, not its ceiling.
"""

from __future__ import annotations

import heapq
import itertools
import math
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import zmq

from sgpo_async.bench.figures import as_json
from sgpo_async.bench.hub_ingest import MAX_BYTES, hub_process
from sgpo_async.errors import SgpoError
from sgpo_async.files import write_whole
from sgpo_async.simulation import Lengths, Settings
from sgpo_async.simulation.hardware import QWEN_7B, Hardware, engine_rates, learner_rates
from sgpo_async.simulation.learner import SimulatedLearner
from sgpo_async.simulation.node import Node
from sgpo_async.simulation.predict import predict
from sgpo_async.simulation.workload import Workload
from sgpo_async.simulation.world import run_of
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire import records as wire

NODES = (1, 4, 16, 64, 256)
FULL_SPEED = 64  # nodes that this process can be at the speed of real ones
LENGTHS = Lengths(longest=2048, median=300, sigma=0.7)
SLOTS, LAG = 64, 8
STEPS = 12  # that are measured
WARM = 8
RESERVE = 0.6  # what the learner takes of what the nodes could generate
QUICK_SPEED = 2.0
DEADLINE_S = 600.0  # of one size


@dataclass(frozen=True, kw_only=True)
class Size:
    """What was measured with one number of nodes."""

    nodes: int
    speed: float
    of_ceiling: float
    tokens_per_s: float  # of simulated time
    rollouts_per_s: float  # of real time
    hub_ms: float  # CPU time of the hub for a rollout
    hub_mb: float
    busy: float  # share of time in which this process computed
    lost: int  # rollouts that were dispatched and neither trained nor in flight

    @property
    def text(self) -> str:
        """One line of the table."""
        return (
            f"{self.nodes:6}{self.of_ceiling:12.1%}{self.tokens_per_s:12,.0f}{self.rollouts_per_s:14,.0f}"
            f"{self.hub_ms:10.3f}{self.hub_mb:9,.0f}{self.speed:8g}{self.busy:9.0%}{self.lost:7}"
        )


HEAD = (
    f"{'nodes':>6}{'of ceiling':>12}{'tokens/s':>12}{'rollouts/s':>14}{'hub, ms':>10}{'hub, MB':>9}{'speed':>8}"
    f"{'client':>9}{'lost':>7}"
)


def run_bench_scale(*, quick: bool, to: Path) -> int:
    """Measure every size; print a table, write scale.txt and scale.json into `to`."""
    found: list[Size] = []
    about = f"Python {platform.python_version()}, pyzmq {zmq.__version__}, {psutil.cpu_count()} cores"
    lines = [f"{QWEN_7B.name}, one GPU a node, lag {LAG}; {about}, load {psutil.getloadavg()[0]:.1f}", HEAD]
    print("\n".join(lines), flush=True)
    for nodes in (4, 16) if quick else NODES:
        speed = QUICK_SPEED if quick else min(1.0, FULL_SPEED / nodes)
        size = measure(nodes, speed=speed, steps=4 if quick else STEPS)
        found.append(size)
        lines.append(size.text)
        print(size.text, flush=True)
        write_whole(to / "scale.txt", "\n".join([*lines, ""]))
        write_whole(to / "scale.json", as_json([vars(size) for size in found]))
    return 0


def settings_of(nodes: int, *, steps: int) -> Settings:
    """A run in which the learner needs RESERVE of what the nodes can generate."""
    gpu = Hardware()
    ranks = max(1, nodes // 4)
    base = Settings(
        nodes=nodes,
        engine=engine_rates(QWEN_7B, gpu, slots=SLOTS),
        learner=learner_rates(QWEN_7B, gpu, ranks=ranks),
        lengths=LENGTHS,
        problems=max(8, 4 * nodes),
        max_lag=LAG,
        steps=steps,
    )
    # The learner's speed is chosen and not that of its GPUs: what is measured is the hub.
    wanted = predict(base).steps["generation"] / RESERVE
    own = predict(base).steps["learner"] - base.learner.step_s - base.learner.publish_s
    learner = replace(base.learner, token_s=base.learner.token_s * wanted / own, step_s=0.0, publish_s=0.0)
    return replace(base, learner=learner)


def measure(nodes: int, *, speed: float, steps: int) -> Size:
    """One size. Raises SgpoError if the run does not get on within DEADLINE_S."""
    settings = settings_of(nodes, steps=steps)
    plain = run_of(settings, steps=10**6)
    run = replace(plain, hub=replace(plain.hub, address="tcp://127.0.0.1:0"))
    with tempfile.TemporaryDirectory() as folder, hub_process(run, Path(folder), journal=True, speed=speed) as address:
        (child,) = multiprocessing.active_children()
        hub = psutil.Process(child.pid)
        fleet = Fleet(address, settings, speed=speed)
        try:
            fleet.until_step(WARM)
            fleet.cut()
            before, began, own, sent = hub.cpu_times(), time.monotonic(), time.process_time(), fleet.rollouts
            fleet.until_step(WARM + steps // 2)
            fleet.exchange(nodes // 4)
            fleet.until_step(WARM + steps)
            seconds, after = time.monotonic() - began, hub.cpu_times()
            busy, rollouts = (time.process_time() - own) / seconds, fleet.rollouts - sent
            spent, _, trained = fleet.cut()
            status = fleet.status()
            cpu = after.user + after.system - before.user - before.system
            return Size(
                nodes=nodes,
                speed=speed,
                of_ceiling=spent["trains"] / sum(spent.values()),
                tokens_per_s=trained / sum(spent.values()),
                rollouts_per_s=rollouts / seconds,
                hub_ms=1000 * cpu / max(rollouts, 1),
                hub_mb=hub.memory_info().rss / 2**20,
                busy=busy,
                lost=_lost(status["ledger"]["rollouts"]),
            )
        finally:
            fleet.close()


def _lost(rollouts: dict[str, Any]) -> int:
    """Rollouts that the ledger does not account for, and those that were dropped."""
    dropped = sum(rollouts["dropped"].values())
    known = rollouts["trained"] + rollouts["in_flight"] + rollouts["buffered"] + dropped
    return abs(rollouts["dispatched"] - known) + dropped


class Fleet:
    """Nodes and a learner, each with a socket of its own, in one thread."""

    def __init__(self, address: str, settings: Settings, *, speed: float) -> None:
        self._address, self._settings, self._speed = address, settings, speed
        self._began = time.monotonic()
        self._workload = Workload(settings.lengths, size=settings.size, seed=settings.seed)
        self._poller = zmq.Poller()
        self._mailboxes: dict[str, Mailbox] = {}
        self._owner: dict[Any, str] = {}  # name of the member, by socket
        self._nodes: dict[str, Node] = {}
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, str]] = []  # when a node is due
        self._due: dict[str, float] = {}
        self._order = itertools.count()
        self._arrivals: list[tuple[float, int]] = []  # of versions at the nodes
        self._reports: list[tuple[float, str]] = []  # when a node reports next
        self._version = -1
        self._status: dict[str, Any] | None = None
        self.rollouts = 0  # that were sent
        self.learner = SimulatedLearner(settings.learner)
        for rank in range(settings.learner.ranks):
            self._connect(f"rank-{rank}")
        for _ in range(settings.nodes):
            self._join()

    @property
    def now(self) -> float:
        """Simulated seconds."""
        return (time.monotonic() - self._began) * self._speed

    def until_step(self, step: int) -> None:
        """Let everybody work until the learner begins this step."""
        deadline = time.monotonic() + DEADLINE_S
        while self.learner.step < step:
            self._turn()
            if time.monotonic() > deadline:
                raise SgpoError(f"bench scale: step {self.learner.step} of {step} after {DEADLINE_S:g} s")

    def cut(self) -> tuple[dict[str, float], Any, int]:
        """What the learner did since the last call; see `SimulatedLearner.cut`."""
        self.learner.advance(self.now)
        return self.learner.cut()

    def exchange(self, count: int) -> None:
        """Nodes leave in the midst of their work, without a word, and as many others join."""
        for name in list(self._nodes)[:count]:
            mailbox = self._mailboxes.pop(name)
            self._poller.unregister(mailbox.dealer.socket)  # type: ignore[attr-defined]
            del self._owner[mailbox.dealer.socket], self._nodes[name]  # type: ignore[attr-defined]
            mailbox.close()
        for _ in range(count):
            self._join()

    def status(self) -> dict[str, Any]:
        """The hub's status."""
        self._status = None
        self._mailboxes["rank-0"].send(wire.StatusRequest())
        deadline = time.monotonic() + DEADLINE_S
        while self._status is None:
            self._turn()
            if time.monotonic() > deadline:
                raise SgpoError(f"bench scale: no status after {DEADLINE_S:g} s")
        return self._status

    def close(self) -> None:
        """Disconnect everybody."""
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def _connect(self, name: str) -> None:
        mailbox = Mailbox(Dealer(self._address, identity=name.encode(), max_bytes=MAX_BYTES))
        socket = mailbox.dealer.socket  # type: ignore[attr-defined]
        self._mailboxes[name], self._owner[socket] = mailbox, name
        self._poller.register(socket, zmq.POLLIN)

    def _join(self) -> None:
        name = f"node-{next(self._numbers)}"
        self._connect(name)
        node = self._nodes[name] = Node(name, self._settings.engine, self._workload, size=self._settings.size)
        node.advance(self.now)
        if self._version >= 0:
            node.offer(self._version, self.now)
        heapq.heappush(self._reports, (self.now + node.report_s, name))
        self._say(name)

    def _turn(self) -> None:
        """Wait for a message or for what is due next, and process it."""
        heaps = (self._heap, self._reports, self._arrivals)
        due = min(self.learner.due, *(heap[0][0] if heap else math.inf for heap in heaps))
        wait_s = min(0.05, max(0.0, (due - self.now) / self._speed))
        for socket, _ in self._poller.poll(math.ceil(1000 * wait_s) if wait_s > 0.0005 else 0):
            name = self._owner[socket]
            for message in self._mailboxes[name].receive(0.0):
                self._take(name, message)
            self._say(name)
        self._pass(self.now)

    def _take(self, name: str, message: wire.Message) -> None:
        if isinstance(message, wire.Status):
            self._status = message.status
        elif name in self._nodes:
            self._nodes[name].take(message, self.now)
        else:
            self.learner.take(int(name.removeprefix("rank-")), message, self.now)

    def _pass(self, now: float) -> None:
        """Everything that is due."""
        while self._arrivals and self._arrivals[0][0] <= now:
            _, self._version = heapq.heappop(self._arrivals)
            for name, node in self._nodes.items():
                node.offer(self._version, now)
                self._say(name)
        while self._heap and self._heap[0][0] <= now:
            due, _, name = heapq.heappop(self._heap)
            if self._due.get(name) == due and name in self._nodes:
                self._nodes[name].advance(now)
                self._say(name)
        self.learner.advance(now)
        self._say("rank-0")
        while self._reports and self._reports[0][0] <= now:
            _, name = heapq.heappop(self._reports)
            if name in self._nodes:
                self._nodes[name].report(now)
                self._say(name)
                heapq.heappush(self._reports, (now + self._nodes[name].report_s, name))

    def _say(self, name: str) -> None:
        """Send what a member has to say, and note when it is due next."""
        node = self._nodes.get(name)
        if node is None:
            said, self.learner.outbox = self.learner.outbox, []
            for rank, message in said:
                self._mailboxes[f"rank-{rank}"].send(message)
                if isinstance(message, wire.Published):
                    arrives = self.now + self._settings.learner.arrive_s
                    heapq.heappush(self._arrivals, (arrives, message.version))
            return
        sent, node.outbox = node.outbox, []
        for message in sent:
            self._mailboxes[name].send(message)
            self.rollouts += isinstance(message, wire.Rollout)
        due = node.due
        if due < math.inf and self._due.get(name) != due:
            self._due[name] = due
            heapq.heappush(self._heap, (due, next(self._order), name))


def main(argv: Sequence[str] | None = None) -> int:
    """For one number of nodes: python -m sgpo_async.bench.scale NODES [SPEED [STEPS]]."""
    words = sys.argv[1:] if argv is None else list(argv)
    nodes, speed, steps = [*words, *("", "1.0", str(STEPS))[len(words) :]]
    print(HEAD)
    print(measure(int(nodes), speed=float(speed), steps=int(steps)).text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
