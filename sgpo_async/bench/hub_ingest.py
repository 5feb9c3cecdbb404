"""A hub that takes in rollouts as fast as it can, for `sgpo-async bench transport`.

    actor processes ── rollouts, ZeroMQ ──▶ hub process: loop, core, journal ── shards ──▶ learner process
                    ◀── leases, acknowledgements ──

The actors answer every lease at once with prepared rollouts of random tokens, the learner commits every batch at once.
So what is measured is the hub: decoding, leases, checks, the ledger, acknowledgements, batches, shards, the disk.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import msgpack
import numpy as np

from sgpo_async.config import Hub, Run
from sgpo_async.config.schema import Learner
from sgpo_async.config.schema import Rollout as RolloutSettings
from sgpo_async.hub.authority import Authority
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.loop import Loop, collect_rarely
from sgpo_async.hub.recovery import recover
from sgpo_async.session import SenderEvent, SenderUp
from sgpo_async.tasks.sources import source_of
from sgpo_async.transport import Dealer, Router, RouterMailbox
from sgpo_async.wire import decode, encode
from sgpo_async.wire import records as wire
from sgpo_async.wire.codec import PREFIX

MAX_BYTES = 2**30
LEASES = 32  # that an actor holds at one time
START_S = 120.0
WAIT_S = 0.05  # longest wait for a message
GROUP = 8  # rollouts of each kind, autonomous and guided

SPAWN = multiprocessing.get_context("spawn")


class HubIngest:
    """Hub, actors and learner; measures one period after the other, and rests between them."""

    def __init__(self, folder: Path, *, tokens: int, seed: int, producers: int, journal: bool) -> None:
        self._stack = ExitStack()
        address = self._stack.enter_context(hub_process(run_of(tokens), folder, journal=journal))
        self._newest = newest = SPAWN.Value("q", -1)  # version; the processes open it by name while it exists here
        pipes = [SPAWN.Pipe() for _ in range(producers)]
        self._actors = [ours for ours, _ in pipes]
        arguments = [(address, i, tokens, seed, newest, pipe[1]) for i, pipe in enumerate(pipes)]
        self._processes = [SPAWN.Process(target=act, args=one, daemon=True) for one in arguments]
        self._processes.append(SPAWN.Process(target=learn, args=(address, newest), daemon=True))
        for process in self._processes:
            process.start()

    def measure(self, seconds: float) -> float:
        """Rollouts per second that the hub has acknowledged."""
        for actor in self._actors:
            actor.send(seconds)
        return sum(actor.recv() for actor in self._actors)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._stack.close()


def run_of(tokens: int) -> Run:
    """A run of which the hub is the bottleneck."""
    return Run(
        steps=10**9,
        rollout=RolloutSettings(autonomous=GROUP, guided=GROUP, max_new_tokens=tokens),
        learner=Learner(problems_per_step=32),
        hub=Hub(address="tcp://127.0.0.1:0", max_lag=4, lease_timeout_s=600, max_message_mb=MAX_BYTES // 2**20),
    )


def rollout_of(tokens: int, seed: int) -> wire.Rollout:
    """A rollout of random tokens, of one version span."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 100_000, tokens, dtype=np.int32)
    return wire.Rollout(
        task=0,
        attempt=0,
        slot=0,
        purpose="train",
        guided=False,
        prompt=random.integers(0, 100_000, 100, dtype=np.int32),
        tokens=ids,
        logprobs=-random.random(tokens, dtype=np.float32),
        versions=np.zeros(1, np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([tokens], np.int32),
        reward=0.0,
        finish="length",
    )


class PreparedRollouts:
    """The frames of a rollout for any lease; only the header and the weight version are new each time."""

    def __init__(self, rollout: wire.Rollout) -> None:
        header, self._arrays = encode(rollout)
        self._header = msgpack.unpackb(header[len(PREFIX) :])
        decoded = decode([header, self._arrays], max_bytes=MAX_BYTES)
        assert isinstance(decoded, wire.Rollout)
        begin = np.frombuffer(self._arrays, np.uint8)
        self._version = decoded.versions.ctypes.data - begin.ctypes.data  # where its bytes begin

    def frames(self, lease: wire.Lease, version: int) -> Iterator[list[bytes]]:
        """The frames of all rollouts of a lease."""
        header, place = dict(self._header), self._version
        arrays = self._arrays[:place] + version.to_bytes(4, "little", signed=True) + self._arrays[place + 4 :]
        header.update(task=lease.task, attempt=lease.attempt, purpose=lease.purpose)
        for slot in range(lease.autonomous + lease.guided):
            header.update(slot=slot, guided=slot >= lease.autonomous)
            yield [PREFIX + msgpack.packb(header), arrays]


def is_kind(frames: Sequence[bytes], kind: str) -> bool:
    """Whether a message is of this kind, by the beginning of its header; does not decode it."""
    return b"\xa4kind" + msgpack.packb(kind) in frames[0][:64]


def act(address: str, number: int, tokens: int, seed: int, newest: Synchronized[int], parent: Connection) -> None:
    """An actor, which works for as long as its parent says each time."""
    dealer = Dealer(address, identity=f"actor-{number}".encode(), max_bytes=MAX_BYTES)
    prepared = PreparedRollouts(rollout_of(tokens, seed + number))
    version = -1
    dealer.send(encode(wire.Hello(role="actor", name=f"actor-{number}")))
    while True:
        seconds = parent.recv()
        acknowledged, until = 0, time.monotonic() + seconds
        while time.monotonic() < until:
            if version != newest.value:
                version = newest.value
                dealer.send(encode(wire.Heartbeat(state="serving", version=version)))
            for frames in dealer.poll(WAIT_S):
                if is_kind(frames, "Ack"):
                    acknowledged += 1
                    continue
                message = decode(frames, max_bytes=MAX_BYTES)
                if isinstance(message, wire.Welcome):
                    dealer.send(encode(wire.Ready(tasks=LEASES, version=version)))
                elif isinstance(message, wire.Lease):
                    for rollout in prepared.frames(message, version):
                        dealer.send(rollout)
                    dealer.send(encode(wire.Ready(tasks=1, version=version)))
        parent.send(acknowledged / seconds)


def learn(address: str, newest: Synchronized[int]) -> None:
    """A learner of one rank, which commits every batch at once."""
    dealer = Dealer(address, identity=b"learner", max_bytes=MAX_BYTES)
    step = 0
    dealer.send(encode(wire.Hello(role="learner", name="learner")))
    while True:
        for frames in dealer.poll(WAIT_S):
            if is_kind(frames, "Shard"):
                dealer.send(encode(wire.Commit(step=step)))
                continue
            if is_kind(frames, "Committed"):
                step += 1
            elif not is_kind(frames, "Welcome"):
                continue
            dealer.send(encode(wire.Published(version=step)))
            dealer.send(encode(wire.BatchRequest(step=step)))
            newest.value = step


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
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(run, folder, journal, speed, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends the wait
    try:
        if not ours.poll(START_S):
            raise TimeoutError(f"the hub did not start within {START_S:g} s")
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
    collect_rarely()
    loop.run(interrupted=str)
