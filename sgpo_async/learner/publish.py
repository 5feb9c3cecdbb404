"""Publish the sharded parameters, or only the adapters that are trained, as a version in the weight store.

    every rank: gather bucket by bucket ──▶ rank 0: CPU copy ──▶ background thread: store, then `published`

The gathers are collectives, which all ranks run in the same order without waiting for anything else in between.
Hashing, writing and the message to the hub need no other rank and overlap with the next step. At most one publication
is in progress. The next call raises the error of a publication that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner.policy import Policy, rows_on
from sgpo_async.model.adapters import is_adapter, merge
from sgpo_async.processes.progress import result_while_moving
from sgpo_async.weights import Manifest
from sgpo_async.weights.short_digest import short_digest

BUCKET_BYTES = 64 * 2**20  # size of one gather, unless a single parameter is larger
PUBLISH_S = 300.0  # longest time without progress in writing one version

NamedTensors = list[tuple[str, Tensor]]


class Store(Protocol):
    """The part of `weights.StoreWriter` that the publisher uses."""

    @property
    def contact(self) -> tuple[str, bytes]:
        """Where the hub finds the store as long as this process lives: a path, or tcp://HOST:PORT with a secret."""
        ...

    def publish(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Make these tensors visible as `version`. Raises WeightsError."""
        ...

    def close(self) -> None:
        """Free the store's resources."""


def gather(policy: Policy) -> NamedTensors:
    """Gather the whole model on rank 0, with adapters merged, as copies in float32 on the CPU.

    Other ranks get an empty list. The names are the model's. A shared parameter appears once, under its first name. A
    collective of all ranks.
    """
    tensors = dict(_gather_all(policy.model.named_parameters(), torch.float32))
    for name, whole in merge(tensors, tensors, policy.lora.scale):
        tensors[name] = whole  # frees what it replaces
    return [(name, tensor) for name, tensor in tensors.items() if not is_adapter(name)]


def gather_trained(policy: Policy, dtype: torch.dtype) -> NamedTensors:
    """Gather only the parameters that are trained, as `gather` does, in `dtype`: all of them, or the adapters."""
    return _gather_all(((name, p) for name, p in policy.model.named_parameters() if p.requires_grad), dtype)


def _gather_all(parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> NamedTensors:
    tensors: NamedTensors = []
    for bucket in _buckets(parameters):
        whole = _gather(list(bucket.values()))
        if dist.get_rank() == 0:
            tensors += [(name, part.to("cpu", dtype, copy=True)) for name, part in zip(bucket, whole, strict=True)]
    return tensors


def _buckets(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, DTensor]]:
    """Group consecutive parameters for one collective each, because one collective per small parameter is slow."""
    bucket: dict[str, DTensor] = {}
    size = 0
    for name, parameter in parameters:
        assert isinstance(parameter, DTensor), f"parameter {name} is not sharded now"
        assert parameter.placements[-1] == Shard(0)
        if bucket and (size + parameter.nbytes > BUCKET_BYTES or parameter.dtype != next(iter(bucket.values())).dtype):
            yield bucket
            bucket, size = {}, 0
        bucket[name] = parameter
        size += parameter.nbytes
    yield bucket


def _gather(parameters: list[DTensor]) -> list[Tensor]:
    """Gather the full tensor of each parameter on every rank, like `full_tensor`, in one collective."""
    mesh = parameters[0].device_mesh  # every node gathers its own copy
    ranks, group = mesh.size(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1)
    sizes = [[len(rows_on(len(p), rank, ranks)) * (p.numel() // len(p)) for p in parameters] for rank in range(ranks)]
    local = torch.cat([p.to_local().detach().flatten() for p in parameters])
    padded = nn.functional.pad(local, (0, max(map(sum, sizes)) - len(local)))
    gathered = local.new_empty(ranks * len(padded))
    dist.all_gather_single(gathered, padded, group=group)
    shares = gathered.view(ranks, -1)
    parts = [shares[rank, : sum(sizes[rank])].split(sizes[rank]) for rank in range(ranks)]
    return [torch.cat(pieces).view(p.shape) for p, pieces in zip(parameters, zip(*parts, strict=True), strict=True)]


Published = Callable[[int, int, np.ndarray | None, str, bytes], None]
"""(version, short digest, score of the canary, and the store's contact) -> None."""


class Publisher:
    """Publishes versions of one policy. Only rank 0 has a store; it calls `published` after writing a version."""

    def __init__(self, policy: Policy, dtype: torch.dtype, *, store: Store | None, published: Published) -> None:
        self._policy, self._dtype, self._store, self._published = policy, dtype, store, published
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._pending: Future[None] | None = None
        self._written = 0  # tensors, of all versions

    def publish(self, version: int, canary: np.ndarray | None = None) -> None:
        """Start to publish what is trained as `version`. A collective of all ranks.

        `canary` is the score of the canary under these weights, if it was measured.

        Raises:
            WeightsError: the publication before this one failed.
        """
        tensors = gather_trained(self._policy, self._dtype)
        self.wait()
        if self._store is not None:
            self._pending = self._thread.submit(self._write, self._store, version, tensors, canary)

    def wait(self) -> None:
        """Wait until the last version is in the store. Raises the error of its publication, or DeadlineExceeded."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            result_while_moving(pending, lambda: self._written, PUBLISH_S)
        except TimeoutError:
            raise DeadlineExceeded("learner", "progress of a weight publication", PUBLISH_S) from None

    def close(self) -> None:
        """Wait like `wait`, then close the store: nothing is published any more."""
        self.wait()
        if self._store is not None:
            self._store.close()

    def _write(self, store: Store, version: int, tensors: NamedTensors, canary: np.ndarray | None) -> None:
        manifest = store.publish(version, self._counted(tensors))
        self._published(version, short_digest(manifest.digest), canary, *store.contact)

    def _counted(self, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for tensor in tensors:
            yield tensor
            self._written += 1
