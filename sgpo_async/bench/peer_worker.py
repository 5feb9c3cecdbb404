"""The same rollouts by TransferQueue or Ray, for `sgpo-async bench transport --peers PYTHON`.

    PYTHON peer_worker.py all TOKENS PRODUCERS SEED      works as `bench.worker_transport`, in the peers' environment

One Ray serves all settings, because an idle one takes a few percent of a core. The settings are named "PEER N". N
rollouts are sent together, as arrays of shape [N, ...]:

    transferqueue N    producers: `client.put`; consumer: `get_meta`, `get_data` and `clear_samples` of 256 rollouts
    ray N              producers: a streaming generator of an actor; consumer: `ray.get` of its objects

All rollouts have the same length, so TransferQueue needs no nested tensors, which are slower. N = 1 is a rollout that
is sent when it is finished, as here; 16 is a group; 256 is half a batch. This file imports nothing of sgpo_async.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray

TAKEN = 256  # rollouts that the consumer takes from TransferQueue at one time
AHEAD = 1024  # rollouts that a producer may be ahead of the consumer


def batch_of(count: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """`count` rollouts, with the arrays and numbers of the records of sgpo_async."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 100_000, (count, tokens), dtype=np.int32)
    return {
        "task": np.arange(count),
        "prompt": random.integers(0, 100_000, (count, 100), dtype=np.int32),
        "tokens": ids,
        "logprobs": -random.random((count, tokens), dtype=np.float32),
        "versions": np.zeros((count, 1), np.int32),
        "digests": np.zeros((count, 1), np.int64),
        "ends": np.full((count, 1), tokens, np.int32),
        "reward": np.zeros(count, np.float32),
    }


@ray.remote(num_cpus=0)
class RayProducer:
    """Yields batches for ever; Ray stops it while AHEAD rollouts have not been taken."""

    def __init__(self, count: int, tokens: int, seed: int) -> None:
        self._batch = batch_of(count, tokens, seed)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The same batch again and again."""
        while True:
            yield self._batch


class Ray:
    """Objects of Ray."""

    def __init__(self, count: int, tokens: int, producers: int, seed: int) -> None:
        self._count = count
        actors = [RayProducer.remote(count, tokens, seed + i) for i in range(producers)]  # type: ignore[attr-defined]
        ahead = max(2, AHEAD // count)
        self._actors = actors  # they live as long as they are referred to
        self._streams = [
            actor.batches.options(num_returns="streaming", _generator_backpressure_num_objects=ahead).remote()
            for actor in actors
        ]

    def take(self) -> int:
        """Take some rollouts; return how many."""
        each = max(1, 64 // self._count)
        found = ray.get([next(stream) for stream in self._streams for _ in range(each)])
        return sum(len(batch["tokens"]) for batch in found)


@ray.remote(num_cpus=0)
class QueueProducer:
    """Puts batches into TransferQueue."""

    def __init__(self, count: int, tokens: int, seed: int) -> None:
        import torch
        import transfer_queue
        from tensordict import TensorDict

        transfer_queue.init()
        self._client = transfer_queue.get_client()
        arrays = {name: torch.from_numpy(array) for name, array in batch_of(count, tokens, seed).items()}
        self._batch = TensorDict(arrays, batch_size=count)
        self._count, self._partition = count, f"train-{count}"

    def put(self, rollouts: int) -> int:
        """Put so many rollouts."""
        for _ in range(rollouts // self._count):
            self._client.put(self._batch, partition_id=self._partition)
        return rollouts


class TransferQueue:
    """TransferQueue with its default storage."""

    def __init__(self, count: int, tokens: int, producers: int, seed: int) -> None:
        import transfer_queue

        transfer_queue.init()
        self._client = transfer_queue.get_client()
        self._fields, self._partition = list(batch_of(1, 1, 0)), f"train-{count}"
        arguments = [(count, tokens, seed + i) for i in range(producers)]
        self._producers = itertools.cycle(QueueProducer.remote(*one) for one in arguments)  # type: ignore[attr-defined]
        self._asked = [next(self._producers).put.remote(TAKEN) for _ in range(producers * (AHEAD // TAKEN))]

    def take(self) -> int:
        """Take TAKEN rollouts."""
        self._asked.append(next(self._producers).put.remote(TAKEN))
        ray.get(self._asked.pop(0))
        found: Any = self._client.get_meta(
            data_fields=self._fields, batch_size=TAKEN, partition_id=self._partition, task_name="learn"
        )
        data = self._client.get_data(found)
        self._client.clear_samples(found)
        rows = data["tokens"].unbind()  # it returns nested tensors, also of rows of one length
        assert rows[0].numpy().dtype == np.int32
        return len(rows)


def main(_settings: str, tokens: str, producers: str, seed: str) -> int:
    """Measure once for each line on standard input, in which a setting follows the seconds."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray and its actors print must not be among the results
    # By its count, TransferQueue needs a CPU for each of its processes.
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    kinds: dict[str, Any] = {"ray": Ray, "transferqueue": TransferQueue}
    streams: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        seconds, peer, count = line.split()
        if (peer, count) not in streams:
            streams[peer, count] = kinds[peer](int(count), int(tokens), int(producers), int(seed))
        taken, began = 0, time.monotonic()
        while (now := time.monotonic()) < began + float(seconds):
            taken += streams[peer, count].take()
        print(taken / (now - began), file=results, flush=True)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
