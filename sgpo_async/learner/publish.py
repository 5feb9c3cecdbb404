"""From sharded parameters to a version in the weight store.

    every rank: gather bucket by bucket ──▶ rank 0: own copy ──▶ background thread: store, then `published`

The gathers are collectives, in the same order on every rank and with nothing in between that waits for anything
else. Writing, hashing and telling the hub need no other rank and overlap the next step. At most one publication is
under way: a failed one is raised by the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner.policy import Policy
from sgpo_async.learner.process_group import all_gather_single

BUCKET_BYTES = 64 * 2**20  # of one gather, unless a single parameter is larger
PUBLISH_S = 300.0  # for one version to be written

NamedTensors = list[tuple[str, Tensor]]


class Store(Protocol):
    """What is needed of `weights.StoreWriter`."""

    def publish(self, version: int, named_tensors: NamedTensors) -> object:
        """Make these tensors visible as `version`. Raises WeightsError."""
        ...


def gather(policy: Policy, dtype: torch.dtype) -> NamedTensors:
    """All parameters, whole, in `dtype`, on the CPU, as the model names them: on rank 0; elsewhere none.

    A shared parameter comes once, under its first name. A collective of all ranks. The copies are the caller's.
    """
    tensors: NamedTensors = []
    for bucket in _buckets(policy.model.named_parameters()):
        whole = _gather(list(bucket.values()))
        if dist.get_rank() == 0:
            tensors += [(name, part.to("cpu", dtype, copy=True)) for name, part in zip(bucket, whole, strict=True)]
    return tensors


def _buckets(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, DTensor]]:
    """Consecutive parameters that are gathered by one collective: many are small, and each collective is a wait."""
    bucket: dict[str, DTensor] = {}
    size = 0
    for name, parameter in parameters:
        assert isinstance(parameter, DTensor), f"{name} is not sharded at this time"
        assert parameter.placements == (Shard(0),)
        if bucket and size + parameter.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = parameter
        size += parameter.nbytes
    yield bucket


def _gather(parameters: list[DTensor]) -> list[Tensor]:
    """The whole of each parameter, on every rank: what `full_tensor` gives one by one."""
    ranks = dist.get_world_size()
    sizes = [[_rows(len(p), rank, ranks) * (p.numel() // len(p)) for p in parameters] for rank in range(ranks)]
    own = torch.cat([p.to_local().detach().flatten() for p in parameters])
    padded = nn.functional.pad(own, (0, max(map(sum, sizes)) - len(own)))
    gathered = own.new_empty(ranks * len(padded))
    all_gather_single(gathered, padded)
    shares = gathered.view(ranks, -1)
    parts = [shares[rank, : sum(sizes[rank])].split(sizes[rank]) for rank in range(ranks)]
    return [torch.cat(pieces).view(p.shape) for p, pieces in zip(parameters, zip(*parts, strict=True), strict=True)]


def _rows(rows: int, rank: int, ranks: int) -> int:
    """How many of `rows` FSDP2 keeps on `rank`: those of its chunk, as torch.chunk divides."""
    chunk = -(-rows // ranks)
    return max(min(chunk, rows - rank * chunk), 0)


class Publisher:
    """Publishes versions of one policy. Rank 0 alone has a store, and hears of it when a version stands in it."""

    def __init__(
        self, policy: Policy, dtype: torch.dtype, *, store: Store | None, published: Callable[[int], None]
    ) -> None:
        self._policy, self._dtype, self._store, self._published = policy, dtype, store, published
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._pending: Future[None] | None = None

    def publish(self, version: int) -> None:
        """Begin to publish the present weights as `version`. A collective of all ranks.

        Raises:
            WeightsError: the publication before this one failed.
        """
        tensors = gather(self._policy, self._dtype)
        self.wait()
        if self._store is not None:
            self._pending = self._thread.submit(self._write, self._store, version, tensors)

    def wait(self) -> None:
        """Until the last version stands in the store. Raises what went wrong with it, or DeadlineExceeded."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result(PUBLISH_S)
        except TimeoutError:
            raise DeadlineExceeded("learner", "end of a weight publication", PUBLISH_S) from None

    def _write(self, store: Store, version: int, tensors: NamedTensors) -> None:
        store.publish(version, tensors)
        self._published(version)
