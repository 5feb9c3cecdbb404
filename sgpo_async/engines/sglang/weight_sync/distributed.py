"""Weights by broadcast: the weight sender is rank 0 of a process group whose other ranks are this actor's servers.

    joining   a server will soon be ready for the version
    send      it is ready, and waits for those that are coming; with the last of them the round begins

The servers of a round have one group, so the weight sender sends one copy to the node however many servers it has. All
of them are paused meanwhile, in sum for as long as if they took turns. The next round uses the same group if it has the
same servers; otherwise a new one is made, as process groups cannot change.

A server that is lost ends the round of the others as well. Each of them then tries again in a group of its own, so that
the fault of one server costs the others nothing but time. `sgpo_async.session.weight_groups` has the requests in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sgpo_async.engines.base import BroadcastGroups, Weights
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerRefused
from sgpo_async.engines.sglang.weight_sync.layout import digest_and_checksums
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, Transport, weight_update
from sgpo_async.errors import SessionError, WeightsError
from sgpo_async.weights.broadcast_plan import BroadcastPlan

GATHER_S = 0.02  # while they still serve: all servers learn of a version at the same moment
SENDER_TIMEOUT_S = 600.0  # for an answer of the weight sender; longer than its own timeouts


class DistributedTransport(Transport):
    """Lets the weight sender broadcast to the servers.

    The actor has no tensors: it compares names and shapes with the model before anything is sent, and the weight sender
    computes the checksums.
    """

    name = "distributed"
    together = True

    def __init__(self, model: ModelFacts, *, tp: int) -> None:
        self._model, self._tp = model, tp
        self._groups: dict[str, _Group] = {}  # by server: the group that it has joined

    def prepare(self, weights: Weights) -> Prepared:
        """Ask the weight sender for the broadcast plan and for the checksums."""
        if weights.groups is None:
            raise WeightsError(f"version {weights.version}: there is no weight sender that could broadcast it")
        plan = _answer(weights.groups.plan(weights.version))
        shapes = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for piece in plan.broadcasts
            for name, dtype, shape in zip(piece.names, piece.dtypes, piece.shapes, strict=True)
        }
        self._model.check(shapes)
        options = {"tp": self._tp, "dtype": self._model.dtype, "device": self._model.device}
        computed = weights.groups.compute(weights.version, digest_and_checksums, self._model.config, **options)
        found, expected = _answer(computed)
        if found != weights.digest:
            raise WeightsError(
                f"version {weights.version}: the weights have digest {found}, but {weights.digest} was announced"
            )
        return Prepared(weights.version, found, expected, _Version(weights.groups, plan))

    @asynccontextmanager
    async def joining(self, api: ServerApi, prepared: Prepared) -> AsyncIterator[None]:
        """The next round waits for this server until it sends, or leaves this context."""
        version: _Version = prepared.payload
        version.coming.add(api.url)
        try:
            await asyncio.sleep(GATHER_S)
            yield
        finally:
            version.comes_no_more(api.url)

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """Receive the version together with the other servers; if that fails, alone."""
        version: _Version = prepared.payload
        round_ = await version.meet(api.url, timeout_s)
        try:
            await self._receive(api, prepared, round_, flush=flush, timeout_s=timeout_s)
        except (ServerRefused, SessionError):
            if len(round_.members) == 1:
                raise
            await self._receive(api, prepared, _Round([api.url]), flush=flush, timeout_s=timeout_s)

    async def _receive(
        self, api: ServerApi, prepared: Prepared, round_: _Round, *, flush: bool, timeout_s: float
    ) -> None:
        """Receive piece by piece: at the same time the weight sender sends, and the server is told to receive."""
        version: _Version = prepared.payload
        group = round_.group = round_.group or self._group_of(round_, version.groups)
        try:
            await self._join(api, group, timeout_s)
            async with weight_update(api, timeout_s):
                sending = round_.sending = round_.sending or group.broadcast(version.plan)
                for number, piece in enumerate(version.plan.broadcasts, 1):
                    last = number == len(version.plan.broadcasts)
                    body = {
                        "names": piece.names,
                        "dtypes": piece.dtypes,
                        "shapes": piece.shapes,
                        "group_name": group.name,
                        "load_format": "flattened_bucket",
                        "flush_cache": flush and last,
                        "weight_version": str(prepared.version) if last else None,
                    }
                    await api.post("/update_weights_from_distributed", body, timeout_s=timeout_s)
                await asyncio.shield(sending)
        except BaseException:
            group.close()
            self._groups.pop(api.url, None)
            raise

    def _group_of(self, round_: _Round, owner: BroadcastGroups) -> _Group:
        """The group that all members of the round are in already, or a new one."""
        members = sorted(round_.members)
        group = self._groups.get(members[0])
        if group is not None and group.open and group.owner is owner and group.members == members:
            return group
        return _Group(owner, members, tp=self._tp, backend="gloo" if self._model.device == "cpu" else "nccl")

    async def _join(self, api: ServerApi, group: _Group, timeout_s: float) -> None:
        """Let the server join the group, and leave the one that it was in."""
        old = self._groups.get(api.url)
        if old is group:
            return
        if old is not None:  # SGLang keeps a group until it is destroyed
            old.close()
            with contextlib.suppress(ServerRefused):
                await api.post("/destroy_weights_update_group", {"group_name": old.name}, timeout_s=timeout_s)
        self._groups[api.url] = group
        await group.join(api, timeout_s)


class _Group:
    """One process group of the weight sender and some servers. The weight sender's calls are shared by its members."""

    def __init__(self, owner: BroadcastGroups, members: list[str], *, tp: int, backend: str) -> None:
        self.owner, self.members, self.open = owner, members, True
        self.name = f"sgpo-{uuid.uuid4().hex[:12]}"  # a new name, because SGLang refuses names that were used before
        self._tp, self._backend, self._size = tp, backend, 1 + tp * len(members)
        self._address = _shared(owner.open(self.name, backend=backend, world_size=self._size))
        self._joined: asyncio.Future[None] | None = None

    async def join(self, api: ServerApi, timeout_s: float) -> None:
        """Let a member join; returns when all have joined."""
        host, port = await asyncio.shield(self._address)
        if not self.open:  # the server would wait for a rendezvous that is gone
            raise SessionError(f"group {self.name}: another server has left it")
        joined = self._joined = self._joined or _shared(self.owner.join(self.name))
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1 + self._tp * self.members.index(api.url),
            "world_size": self._size,
            "group_name": self.name,
            "backend": self._backend,
        }
        await api.post("/init_weights_update_group", body, timeout_s=timeout_s)
        await asyncio.shield(joined)

    def broadcast(self, plan: BroadcastPlan) -> asyncio.Future[None]:
        """Let the weight sender send the version of `plan`."""
        return _shared(self.owner.broadcast(self.name, plan))

    def close(self) -> None:
        """Let the weight sender leave, for good; this ends what the other members wait for."""
        if self.open:
            self.open = False
            self.owner.close(self.name)


@dataclass(eq=False)
class _Round:
    """One broadcast of a version to some servers."""

    members: list[str] = field(default_factory=list)  # URLs
    complete: asyncio.Event = field(default_factory=asyncio.Event)  # the servers that were expected have come
    group: _Group | None = None
    sending: asyncio.Future[None] | None = None


class _Version:
    """The plan of a version, and the round in which the next servers receive it."""

    def __init__(self, groups: BroadcastGroups, plan: BroadcastPlan) -> None:
        self.groups, self.plan = groups, plan
        self.coming: set[str] = set()  # servers that will be ready soon
        self._next = _Round()

    async def meet(self, url: str, timeout_s: float) -> _Round:
        """The round of a server that is ready: it begins when no other one is coming, or after `timeout_s`."""
        round_ = self._next
        round_.members.append(url)
        self.comes_no_more(url)
        try:
            async with asyncio.timeout(timeout_s):
                await round_.complete.wait()
        except TimeoutError:
            self._begin(round_)
        except asyncio.CancelledError:
            if not round_.complete.is_set():
                round_.members.remove(url)
            raise
        return round_

    def comes_no_more(self, url: str) -> None:
        """This server has come, or will not."""
        self.coming.discard(url)
        if not self.coming and self._next.members:
            self._begin(self._next)

    def _begin(self, round_: _Round) -> None:
        if round_ is self._next:
            self._next = _Round()
        round_.complete.set()


def _shared(future: Future[Any]) -> asyncio.Future[Any]:
    """A future that several tasks await; an error that none of them waited for is not reported as lost."""
    shared = asyncio.wrap_future(future)
    shared.add_done_callback(lambda done: done.cancelled() or done.exception())
    return shared


def _answer(future: Future[Any]) -> Any:
    """The answer of the weight sender. Raises SessionError if it does not answer in time."""
    try:
        return future.result(SENDER_TIMEOUT_S)
    except TimeoutError:
        raise SessionError(f"the weight sender gave no answer within {SENDER_TIMEOUT_S:g} s") from None
