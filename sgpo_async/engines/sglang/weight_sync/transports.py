"""How one version reaches one server. A transport prepares once for all servers, then sends to each.

    tensor         HTTP requests with the tensors themselves
    distributed    broadcasts from the learner's end of a group (gloo or NCCL) that the server joins
    disk           a folder, written whole under another name first; the server loads it

The prefix cache is flushed with each version, since keys and values of the old weights would serve later requests with
the same prefix; only in-place updates do not, and they have no prefix cache.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from sgpo_async.engines.base import Weights
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused
from sgpo_async.engines.sglang.weight_sync.layout import Checksums, expected_checksums
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts
from sgpo_async.errors import EngineError, SessionError, SgpoError, WeightsError

BUCKET_BYTES = 64 * 2**20  # of tensors in one request
SENDER_TIMEOUT_S = 600.0  # beyond the link's own deadlines
KEPT_VERSIONS = 2  # version folders: servers may still be reading the one before
COPIED = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Prepared:
    """One version, checked against the model, ready to be sent."""

    version: int
    expected: list[Checksums]  # of a server's parameters afterwards, by tensor parallel rank
    payload: Any  # the transport's own


class Transport(Protocol):
    """One way for weights to travel."""

    name: str

    def prepare(self, weights: Weights) -> Prepared:
        """What `send` needs, made in a thread while servers go on serving.

        Raises WeightsError if the weights are damaged or not the model's (nothing is sent), Superseded if they are
        gone, SessionError if the learner does not answer.
        """

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """Put the version into a server that nobody uses or that is paused; `timeout_s` for each request.

        Raises ServerRefused, ServerGone or SessionError; the server's weights are then unknown.
        """

    def close(self) -> None:
        """Free what lies about."""


class TensorTransport:
    """The payload is a plain pickle of [(name, CPU tensor), ...] in base64, one copy for each of `tp` ranks.

    Plain, since torch's own multiprocessing pickles name file descriptors of this process, and a server that is no
    child of it dies of them.
    """

    name = "tensor"

    def __init__(self, model: ModelFacts, *, tp: int) -> None:
        self._model, self._tp = model, tp

    def prepare(self, weights: Weights) -> Prepared:
        """Reads a whole copy."""
        tensors = self._model.read(weights)
        return Prepared(weights.version, self._model.expected(tensors), self.payloads(tensors))

    def payloads(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """One for each request, of at most BUCKET_BYTES or one tensor."""
        payloads: list[str] = []
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in tensors.items():
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                payloads.append(_payload(bucket))
                bucket, size = [], 0
            bucket.append((name, tensor.contiguous().clone()))  # alone in its storage, which is pickled whole
            size += tensor.nbytes
        return [*payloads, _payload(bucket)]

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """One request for each payload."""
        async with _begun(api, timeout_s):
            for number, payload in enumerate(prepared.payload, 1):
                last = number == len(prepared.payload)
                body = {
                    "serialized_named_tensors": [payload] * self._tp,
                    "flush_cache": flush and last,
                    "weight_version": str(prepared.version) if last else None,
                }
                await api.post("/update_weights_from_tensor", body, timeout_s=timeout_s)

    def close(self) -> None:
        """Nothing lies about."""


class DistributedTransport:
    """Rank 0 of a group for each server is the learner's link; see `sgpo_async.session.weight_groups`.

    The actor holds no tensors: what is sent is compared with the model by name and shape before, and the link computes
    the checksums. A group in which anything failed is left, and the next update makes a new one.
    """

    name = "distributed"

    def __init__(self, model: ModelFacts, *, tp: int) -> None:
        self._model, self._tp = model, tp
        self._groups: dict[str, tuple[Any, str]] = {}  # by server: whose group, and its name

    def prepare(self, weights: Weights) -> Prepared:
        """Asks the link for the plan and for the checksums."""
        if weights.groups is None:
            raise WeightsError(f"version {weights.version}: nobody is there to broadcast it")
        plan = _answer(weights.groups.plan(weights.version))
        shapes = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for piece in plan.broadcasts
            for name, dtype, shape in zip(piece.names, piece.dtypes, piece.shapes, strict=True)
        }
        self._model.check(shapes)
        words = {"tp": self._tp, "dtype": self._model.dtype, "device": self._model.device}
        computed = weights.groups.compute(weights.version, expected_checksums, self._model.config, **words)
        return Prepared(weights.version, _answer(computed), (weights.groups, plan))

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """Both ends at the same time: the link broadcasts while the server is asked to receive, piece by piece."""
        groups, plan = prepared.payload
        name = await self._group(api, groups, timeout_s)
        try:
            async with _begun(api, timeout_s):
                sending = asyncio.wrap_future(groups.broadcast(name, plan))
                try:
                    for number, piece in enumerate(plan.broadcasts, 1):
                        last = number == len(plan.broadcasts)
                        body = {
                            "names": piece.names,
                            "dtypes": piece.dtypes,
                            "shapes": piece.shapes,
                            "group_name": name,
                            "load_format": "flattened_bucket",
                            "flush_cache": flush and last,
                            "weight_version": str(prepared.version) if last else None,
                        }
                        await api.post("/update_weights_from_distributed", body, timeout_s=timeout_s)
                    await sending
                finally:
                    sending.cancel()
        except BaseException:
            self._leave(api.url)
            raise

    async def _group(self, api: ServerApi, groups: Any, timeout_s: float) -> str:
        """The server's group with this session's link; a new one where there is none."""
        owner, name = self._groups.get(api.url, (None, ""))
        if owner is groups:
            return name
        if owner is not None:  # of a session that is over: SGLang keeps a group until it is told
            with contextlib.suppress(ServerRefused):
                await api.post("/destroy_weights_update_group", {"group_name": name}, timeout_s=timeout_s)
        name = f"sgpo-{uuid.uuid4().hex[:12]}"  # never used before: SGLang would refuse it
        backend = "gloo" if self._model.device == "cpu" else "nccl"
        size = 1 + self._tp
        try:
            host, port = await asyncio.wrap_future(groups.open(name, backend=backend, world_size=size))
            joined = asyncio.wrap_future(groups.join(name))
            where = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size}
            body = where | {"group_name": name, "backend": backend}
            try:
                await api.post("/init_weights_update_group", body, timeout_s=timeout_s)
                await joined
            finally:
                joined.cancel()
        except BaseException:
            groups.close(name)
            raise
        self._groups[api.url] = groups, name
        return name

    def _leave(self, url: str) -> None:
        owner, name = self._groups.pop(url)
        owner.close(name)

    def close(self) -> None:
        """The groups end with their session."""


class DiskTransport:
    """Writes folders `v000012` of safetensors below `folder`, which the servers can read."""

    name = "disk"

    def __init__(self, model: ModelFacts, folder: str) -> None:
        temporary = f"{tempfile.gettempdir()}/sgpo-weights-{uuid.uuid4().hex[:12]}"
        self._own = not folder
        self._folder = Path(folder or temporary)
        self._model = model
        self._written: list[Path] = []

    def prepare(self, weights: Weights) -> Prepared:
        """Reads a whole copy and writes it. Raises EngineError if there is no room for it."""
        tensors = self._model.read(weights)
        return Prepared(weights.version, self._model.expected(tensors), self.write(weights.version, tensors))

    def write(self, version: int, tensors: Mapping[str, torch.Tensor]) -> str:
        """Write a folder, which appears under its name when it is whole; those before the last are removed."""
        target = self._folder / f"v{version:06d}-{os.getpid()}"
        draft = target.with_suffix(".part")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft / "model.safetensors")
            for name in COPIED:
                if (source := Path(self._model.folder) / name).exists():
                    shutil.copy(source, draft / name)
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
        except OSError as error:
            raise EngineError(f"engine.sglang.folder: cannot write {target}: {error.strerror}") from None
        self._written = [path for path in self._written if path != target] + [target]
        for path in self._written[:-KEPT_VERSIONS]:
            shutil.rmtree(path, ignore_errors=True)
        self._written = self._written[-KEPT_VERSIONS:]
        return str(target)

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """One request; the server rolls back by itself if it cannot load the folder."""
        body = {"model_path": prepared.payload, "weight_version": str(prepared.version), "flush_cache": flush}
        await api.post("/update_weights_from_disk", body, timeout_s=timeout_s)

    def close(self) -> None:
        """Remove the folders."""
        for path in self._written:
            shutil.rmtree(path, ignore_errors=True)
        if self._own:
            shutil.rmtree(self._folder, ignore_errors=True)


def _answer(future: Any) -> Any:
    """What the link says; it has deadlines of its own. Raises SessionError if it says nothing."""
    try:
        return future.result(SENDER_TIMEOUT_S)
    except TimeoutError:
        raise SessionError(f"the learner's link: no answer within {SENDER_TIMEOUT_S:g} s") from None


@asynccontextmanager
async def _begun(api: ServerApi, timeout_s: float) -> AsyncIterator[None]:
    """Between begin and end. Ended also after a failure: a server in an open update refuses to begin another."""
    await api.post("/begin_weight_update", {}, timeout_s=timeout_s)
    try:
        yield
    except SgpoError:
        with contextlib.suppress(ServerRefused, ServerGone):
            await api.post("/end_weight_update", {}, timeout_s=timeout_s)
        raise
    await api.post("/end_weight_update", {}, timeout_s=timeout_s)


def _payload(bucket: list[tuple[str, torch.Tensor]]) -> str:
    return base64.b64encode(pickle.dumps(bucket, protocol=pickle.HIGHEST_PROTOCOL)).decode()
