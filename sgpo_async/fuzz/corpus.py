"""Valid messages of every kind that travels in a run, to be changed: those of a simulated one, and the rarer ones."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np

from sgpo_async.hub.events import Received
from sgpo_async.simulation import EngineRates, LearnerRates, Lengths, Settings
from sgpo_async.simulation.world import World
from sgpo_async.wire import records as wire

OF_A_KIND = 8
SMALL = Settings(
    nodes=3,
    engine=EngineRates(slots=8, base_s=0.01, context_s=1e-5),
    learner=LearnerRates(ranks=1, token_s=1e-4),
    lengths=Lengths(longest=60, median=20, sigma=0.6),
    problems=4,
    autonomous=3,
    guided=2,
    steps=6,
)
INT, FLOAT = np.int32, np.float32
PART = wire.PartialRollout(
    slot=1,
    start=0,
    tokens=np.arange(5, dtype=INT),
    logprobs=np.full(5, -0.5, FLOAT),
    versions=np.array([0, 1], INT),
    digests=np.array([3, 4], np.int64),
    ends=np.array([2, 5], INT),
)
RARE: tuple[wire.Message, ...] = (
    wire.Canary(version=1, digest=7, logprobs=np.array([-0.5, -1.0], FLOAT)),
    wire.CloseSender(sender=1),
    wire.Evaluate(version=2),
    wire.Finish(reason="done"),
    wire.Goodbye(),
    wire.NoBatch(step=1, reason="the run ends"),
    wire.OpenSender(sender=1, name="node-1"),
    wire.Pending(idle_s=1.5),
    wire.Progress(task=1, attempt=0, purpose="train", partial=(PART, PART)),
    wire.Refused(reason="the name is taken"),
    wire.Release(task=1, attempt=0, reason="the prompt is too long"),
    wire.Restore(state=b"x" * 40, id="r2"),
    wire.Restored(version=3),
    wire.Revoked(task=1, attempt=0),
    wire.SenderDown(sender=1, reason="peer lost"),
    wire.SenderUp(sender=1, host="10.0.0.2", port=5000, secret=b"s" * 32),
    wire.Settings(settings={"steps": 5, "optim": {"lr": 1e-6, "betas": [0.9, 0.99]}}),
    wire.SettingsRequest(),
    wire.Snapshot(step=4, state=b"x" * 40),
    wire.SnapshotRequest(step=4),
    wire.Status(status={"step": 5, "actors": [{"name": "node-1"}]}),
    wire.StatusRequest(),
    wire.Stop(reason="finished"),
)


class _Overheard(World):
    """A simulated run that keeps some messages of each kind."""

    def __init__(self, settings: Settings) -> None:
        self.heard: dict[type, list[wire.Message]] = defaultdict(list)
        super().__init__(settings)

    def _handle(self, event: Any) -> None:
        if isinstance(event, Received):
            self._keep(event.message)
        super()._handle(event)

    def _give(self, member: bytes, message: wire.Message) -> bytes:
        self._keep(message)
        return super()._give(member, message)

    def _keep(self, message: wire.Message) -> None:
        kept = self.heard[type(message)]
        if len(kept) < OF_A_KIND:
            kept.append(message)


@cache
def messages() -> list[wire.Message]:
    """Some messages of each kind."""
    world = _Overheard(SMALL)
    world.run()
    return [*(message for kept in world.heard.values() for message in kept), *RARE]
