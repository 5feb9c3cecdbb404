"""Ranks without actors, under torchrun: `... worker_learner CONFIG {learner,synchronous} SECONDS [key=value ...]`.

learner        update on one real batch, again and again
synchronous    generate, update, load: the colocated loop that the asynchronous system is compared with
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sgpo_async.bench.synchronous_actor import SynchronousActor
from sgpo_async.config import Run, load
from sgpo_async.learner.process_group import join_world
from sgpo_async.learner.publish import gather
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.train import build
from sgpo_async.wire.records import Shard

COLLECTIVE_S = 600.0


class Colocated:
    """One rank that generates and learns in turn."""

    def __init__(self, run: Run, mesh: DeviceMesh) -> None:
        self.run, self.rank, self.ranks = run, dist.get_rank(), dist.get_world_size()
        self.stepper: Stepper = build(run, mesh)[0]
        self.actor = SynchronousActor(run)
        self.generating_s = 0.0
        self._load(0)

    def shard(self, step: int) -> Shard:
        """This rank's part of the batch of `step`, from its own engine."""
        began = time.monotonic()
        batch = self.run.learner.problems_per_step
        own = range(step * batch + self.rank, (step + 1) * batch, self.ranks)
        rollouts = tuple(self.actor.roll_out([self.actor.task(number) for number in own]))
        self.generating_s += time.monotonic() - began
        return Shard(step=step, version=step, problems=batch, rollouts=rollouts)

    def steps(self) -> Iterator[tuple[Shard, dict[str, Any]]]:
        """The synchronous loop; yields the shard and the metrics of each step."""
        for step in range(self.run.steps):
            shard = self.shard(step)
            metrics = self.stepper.update(shard)
            self._load(step + 1)
            yield shard, metrics

    def _load(self, version: int) -> None:
        """Gather the weights on rank 0 and load them into the engine of every rank."""
        named = dict(gather(self.stepper.policy))
        received = [named]
        dist.broadcast_object_list(received, src=0)
        self.actor.load(version, received[0])


def main(config: str, setting: str, seconds: str, *words: str) -> None:
    """Run one step to warm up, then `setting` for about `seconds`; rank 0 prints its counts."""
    run = load(config, words)
    colocated = Colocated(run, join_world(run.learner, timeout_s=COLLECTIVE_S))
    lap = _learner(colocated) if setting == "learner" else _synchronous(colocated)
    problems, tokens = 0, 0
    next(lap)
    colocated.generating_s, began = 0.0, time.monotonic()
    for trained in lap:
        problems += colocated.run.learner.problems_per_step
        tokens += trained
        if _agreed(time.monotonic() - began > float(seconds)):
            break
    elapsed = time.monotonic() - began
    if colocated.rank == 0:
        generating = colocated.generating_s / elapsed
        print(json.dumps({"tokens": tokens, "problems": problems, "seconds": elapsed, "generating": generating}))
    dist.destroy_process_group()


def _learner(colocated: Colocated) -> Iterator[int]:
    shard = colocated.shard(0)
    while True:
        yield int(colocated.stepper.update(shard)["tokens"])


def _synchronous(colocated: Colocated) -> Iterator[int]:
    for _, metrics in colocated.steps():
        yield int(metrics["tokens"])


def _agreed(over: bool) -> bool:
    """Rank 0's decision to stop, on every rank, so that all do the same number of steps."""
    flag = torch.tensor([int(over)])
    dist.broadcast(flag, src=0)
    return bool(flag.item())


if __name__ == "__main__":
    main(*sys.argv[1:])
