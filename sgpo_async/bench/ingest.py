"""How many rollouts a hub takes in per second, with its journal and without.

    this process: an actor and a learner that do no work ── ZeroMQ ──▶ hub process: loop, core, journal

The actor answers every lease at once with rollouts of random tokens, the learner commits every batch at once. So what
is measured is the hub: decoding, leases, the ledger, acknowledgements, batches, the disk. Both settings take turns.

    python -m sgpo_async.bench.ingest [--tokens 1000] [--seconds 5] [--repetitions 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from sgpo_async.config import Hub, Run
from sgpo_async.config.schema import Learner, Rollout
from sgpo_async.hub.authority import Authority
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.loop import Loop
from sgpo_async.hub.recovery import recover
from sgpo_async.session import SenderEvent, SenderUp
from sgpo_async.tasks.sources import source_of
from sgpo_async.transport import Dealer, Mailbox, Router, RouterMailbox
from sgpo_async.wire import records as wire

MAX_BYTES = 2**30
LEASES = 32  # that the actor holds at one time
WARM_S = 1.0


def main() -> None:
    """Measure and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a rollout")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", default="", help="where the journal is written (default: a temporary folder)")
    args = parser.parse_args()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.repetitions):
        for journal, measured in rates.items():
            with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
                measured.append(measure(Path(folder), tokens=args.tokens, seconds=args.seconds, journal=journal))
    without, with_journal = rates[False], rates[True]
    ratio = statistics.median(b / a for a, b in zip(without, with_journal, strict=True))
    for name, measured in (("without journal", without), ("with journal", with_journal)):
        median = statistics.median(measured)
        print(f"{name:16} {median:8.0f} rollouts/s  {median * args.tokens / 1e6:6.2f} M tokens/s")
    print(f"{'ratio':16} {ratio:8.2f}")
    print(json.dumps({"tokens": args.tokens, "without": without, "with": with_journal, "ratio": ratio}))


def measure(folder: Path, *, tokens: int, seconds: float, journal: bool) -> float:
    """Acknowledged rollouts per second."""
    run = Run(
        steps=10**9,
        rollout=Rollout(autonomous=8, guided=8, max_new_tokens=tokens),
        learner=Learner(problems_per_step=32),
        hub=Hub(address="tcp://127.0.0.1:0", max_lag=4, lease_timeout_s=600, max_message_mb=MAX_BYTES // 2**20),
    )
    with hub_process(run, folder, journal=journal) as address:
        members = Members(address, tokens=tokens)
        try:
            members.work(WARM_S)
            return members.work(seconds) / seconds
        finally:
            members.close()


class Members:
    """An actor and a learner of one rank, in one thread."""

    def __init__(self, address: str, *, tokens: int) -> None:
        self._actor = Mailbox(Dealer(address, identity=b"actor", max_bytes=MAX_BYTES))
        self._learner = Mailbox(Dealer(address, identity=b"learner", max_bytes=MAX_BYTES))
        random = np.random.default_rng(0)
        self._tokens = random.integers(0, 100_000, tokens, dtype=np.int32)
        self._logprobs = -random.random(tokens, dtype=np.float32)
        self._step = self._version = 0
        self._acknowledged = 0
        self._learner.send(wire.Hello(role="learner", name="learner"))
        self._actor.send(wire.Hello(role="actor", name="actor"))

    def work(self, seconds: float) -> int:
        """Answer messages for so long; return how many rollouts were acknowledged."""
        before, until = self._acknowledged, time.monotonic() + seconds
        while time.monotonic() < until:
            for message in self._actor.receive(0.001):
                self._serve(message)
            for message in self._learner.receive(0.0):
                self._train(message)
        return self._acknowledged - before

    def close(self) -> None:
        """Disconnect."""
        self._actor.close()
        self._learner.close()

    def _serve(self, message: wire.Message) -> None:
        match message:
            case wire.Welcome():
                self._actor.send(wire.Ready(tasks=LEASES, version=0))
            case wire.Lease():
                for slot in range(message.autonomous + message.guided):
                    self._actor.send(self._rollout(message, slot))
                self._actor.send(wire.Ready(tasks=1, version=self._version))
            case wire.Ack():
                self._acknowledged += 1

    def _train(self, message: wire.Message) -> None:
        match message:
            case wire.Welcome():
                self._learner.send(wire.Published(version=0))
                self._learner.send(wire.BatchRequest(step=0))
            case wire.Shard():
                self._learner.send(wire.Commit(step=message.step))
            case wire.Committed():
                self._step, self._version = message.step + 1, message.step + 1
                self._learner.send(wire.Published(version=self._version))
                self._learner.send(wire.BatchRequest(step=self._step))
                self._actor.send(wire.Heartbeat(state="serving", version=self._version))  # it has loaded the weights

    def _rollout(self, lease: wire.Lease, slot: int) -> wire.Rollout:
        return wire.Rollout(
            task=lease.task,
            attempt=lease.attempt,
            slot=slot,
            purpose=lease.purpose,
            guided=slot >= lease.autonomous,
            prompt=self._tokens[:100],
            tokens=self._tokens,
            logprobs=self._logprobs,
            versions=np.array([self._version], np.int32),
            digests=np.zeros(1, np.int64),
            ends=np.array([len(self._tokens)], np.int32),
            reward=0.0,
            finish="length",
        )


class NoSender:
    """A weight sender that is up at once and sends nothing."""

    host = "127.0.0.1"

    def __init__(self, _name: str, _road: str) -> None:
        self._events: list[SenderEvent] = [SenderUp(1)]

    def poll(self) -> Sequence[SenderEvent]:
        """The event that it is up, once."""
        events, self._events = self._events, []
        return events

    def stop(self, deadline_s: float) -> None:
        """There is no process."""


@contextmanager
def hub_process(run: Run, folder: Path, *, journal: bool, speed: float = 1.0) -> Iterator[str]:
    """A hub in a process of its own, whose clock is `speed` times as fast; yields its address."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(run, folder, journal, speed, theirs))
    process.start()
    theirs.close()  # so that the end of the process ends the wait
    try:
        if not ours.poll(120):
            raise TimeoutError("the hub did not start within 120 s")
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(run: Run, folder: Path, journal: bool, speed: float, parent: Connection) -> None:
    core = HubCore(run, source_of(run))
    written = Journal(folder) if journal else None
    if written:
        core, _ = recover(core, written)
    router = Router(run.hub.address, max_bytes=MAX_BYTES)
    parent.send(router.address)
    loop = Loop(
        core,
        mailbox=RouterMailbox(router),
        authority=Authority(),
        spawn_sender=NoSender,
        journal=written,
        clock=lambda: speed * time.monotonic(),
    )
    loop.run(interrupted=str)


if __name__ == "__main__":
    main()
