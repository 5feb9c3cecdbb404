"""From sharded parameters to a version in the weight store.

    every rank: gather parameter by parameter ──▶ rank 0: own copy ──▶ background thread: store, then `published`

The gathers are collectives, in the same order on every rank and with nothing in between that waits for anything
else. Writing, hashing and telling the hub need no other rank and overlap the next step. At most one publication is
under way: a failed one is raised by the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.learner.policy import Policy

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
    tensors = []
    for name, parameter in policy.model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded at this time"
        whole = parameter.full_tensor().detach()
        if dist.get_rank() == 0:
            tensors.append((name, whole.to("cpu", dtype, copy=True)))
    return tensors


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
