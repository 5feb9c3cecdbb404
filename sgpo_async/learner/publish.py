"""Publish the sharded parameters, or only the adapters that are trained, as a version in the weight store.

    every rank: copy its shards into its buffer ──▶ background thread: its bytes into the store (`ShareGroup`)
                                                    rank 0: verify, make visible, `published`

The training loop waits for the copy, and before it for the end of the previous publication, whose bytes are in the
buffer. The buffer is allocated once; it is pinned if the parameters are on a GPU. The rest overlaps with the next step.
If parameters are replicated over nodes, the ranks of rank 0's node publish and the others do nothing. The next call
raises the error of a publication that failed.

`gather` collects whole tensors on rank 0, for exports and evaluations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner.policy import Policy, rows_on
from sgpo_async.learner.share_group import ShareGroup, Store
from sgpo_async.model.adapters import is_adapter, merge
from sgpo_async.processes.progress import result_while_moving
from sgpo_async.weights.shares import layout
from sgpo_async.weights.short_digest import short_digest

log = logging.getLogger(__name__)

BUCKET_BYTES = 64 * 2**20  # size of one gather, unless a single parameter is larger
PUBLISH_S = 300.0  # longest time without a round of a publication

NamedTensors = list[tuple[str, Tensor]]


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
    return _gather_all(_trained(policy), dtype)


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
    """Publishes versions of one policy. Only rank 0 has a store; it calls `published` after writing a version.

    The constructor is a collective of all ranks.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype, *, store: Store | None, published: Published) -> None:
        self._policy, self._store, self._published = policy, store, published
        trained = dict(_trained(policy))
        mesh = next(iter(trained.values())).device_mesh
        self._group = ShareGroup(mesh, store, layout((name, dtype, p.shape) for name, p in trained.items()))
        parts = [p.to_local().shape for p in trained.values()] if self._group.member else []
        sizes = [part.numel() for part in parts]
        self._buffer = torch.empty(sum(sizes), dtype=dtype)
        if policy.home.type == "cuda" and sizes:
            _pin(self._buffer)
        self._places = [flat.view(part) for flat, part in zip(self._buffer.split(sizes), parts, strict=True)]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._pending: Future[None] | None = None

    def publish(self, version: int, canary: np.ndarray | None = None) -> None:
        """Start to publish what is trained as `version`. All ranks call it.

        `canary` is the score of the canary under these weights, if it was measured.

        Raises:
            WeightsError: the publication before this one failed; on every rank that took part in it.
        """
        self.wait()
        if self._group.member:
            self._pending = self._thread.submit(self._write, version, self._copy(), canary)

    def wait(self) -> None:
        """Wait until the last version is in the store. Raises the error of its publication, or DeadlineExceeded."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            result_while_moving(pending, lambda: self._group.rounds, PUBLISH_S)
        except TimeoutError:
            raise DeadlineExceeded("learner", "progress of a weight publication", PUBLISH_S) from None

    def close(self) -> None:
        """Wait like `wait`, then close the store: nothing is published any more."""
        self.wait()
        if self._store is not None:
            self._store.close()

    @torch.no_grad()
    def _copy(self) -> torch.cuda.Event | None:
        """Copy this rank's shards into its buffer; return the event after which they are there, if that takes time.

        Later kernels of the same stream, like those of the next step, change the shards only after they are copied.
        """
        for place, (_, parameter) in zip(self._places, _trained(self._policy), strict=True):
            local = parameter.to_local()
            place.copy_(local.to(place.dtype) if local.is_cuda else local, non_blocking=True)
        if self._policy.home.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(self, version: int, copied: torch.cuda.Event | None, canary: np.ndarray | None) -> None:
        if copied:
            copied.synchronize()
        manifest = self._group.publish(version, self._buffer.view(torch.uint8))
        if self._store is not None and manifest is not None:
            self._published(version, short_digest(manifest.digest), canary, *self._store.contact)


def _pin(buffer: Tensor) -> None:
    """Lock the pages of `buffer`, as it is: torch's own allocator would round its size up to a power of two."""
    portable = 1  # cudaHostRegisterPortable: for every device
    if error := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, portable)):
        text = "%.1f GB of host memory cannot be locked (CUDA error %d), so each publication copies more slowly"
        log.warning(text, buffer.nbytes / 1e9, error)


def _trained(policy: Policy) -> Iterator[tuple[str, DTensor]]:
    """The parameters that are published: all that are trained, a shared one once, under its first name."""
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter, DTensor), f"parameter {name} is not sharded now"
            assert parameter.placements[-1] == Shard(0)
            yield name, parameter
