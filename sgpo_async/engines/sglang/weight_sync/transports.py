"""Transports: how one version reaches one server. A transport prepares once for all servers, then sends to each.

    disk           a folder, in shared memory or on a disk, that is renamed when it is complete; the server loads it
    tensor         HTTP requests that contain the tensors
    distributed    the weight sender broadcasts in a process group (gloo or NCCL) that the server joins

What was prepared is kept for as long as a server may have to go back to it (see `serving.versions`).

Each update flushes the prefix cache: otherwise keys and values of the old weights would serve later requests with the
same prefix. In-place updates do not flush; servers with this policy have no prefix cache.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import logging
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sgpo_async.engines.base import Weights
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused
from sgpo_async.engines.sglang.weight_sync.folder import SHARED_MEMORY, OwnedFolder, default_root
from sgpo_async.engines.sglang.weight_sync.layout import Checksums
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts
from sgpo_async.errors import EngineError, SgpoError
from sgpo_async.files import set_usual_modes

log = logging.getLogger(__name__)

BUCKET_BYTES = 64 * 2**20  # size limit of the tensors in one request
ENCODED = 3 * 2**18  # bytes that are encoded at a time; a multiple of 3, so that the parts are one text of base64
COPIED = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Prepared:
    """One version, checked against the model and ready to be sent."""

    version: int
    digest: str  # of the tensors that `expected` was computed from
    expected: list[Checksums]  # of a server's parameters after the update, by tensor parallel rank
    payload: Any  # its type depends on the transport


class Transport(ABC):
    """One way to send weights to servers."""

    name: str
    together: bool = False  # whether servers are updated at the same time, and not in turns

    @abstractmethod
    def prepare(self, weights: Weights) -> Prepared:
        """Prepare what `send` needs; called in a thread while the servers continue to serve.

        Raises WeightsError if the weights are damaged or of another model (nothing is sent), Superseded if they have
        been overwritten, SessionError if the weight sender does not answer, EngineError for other failures.
        """

    def joining(self, api: ServerApi, prepared: Prepared) -> AbstractAsyncContextManager[None]:  # noqa: ARG002
        """In this context, the server is made ready for `send`."""
        return nullcontext()

    @abstractmethod
    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """Load the version into a server that is idle or paused; `timeout_s` is the timeout of each request.

        Raises ServerRefused, ServerGone or SessionError; the server's weights are then unknown.
        """

    def release(self, prepared: Prepared) -> None:  # noqa: B027
        """Free what `prepare` made of one version: no server needs it any more. Called in a thread."""

    def close(self) -> None:  # noqa: B027
        """Free all resources."""


class TensorTransport(Transport):
    """Sends plain pickles of [(name, CPU tensor), ...] in base64, one copy for each of `tp` ranks.

    A pickle of torch.multiprocessing would refer to file descriptors of this process, which kills a server that is
    not a child of this process. SGLang's flattened buckets would save it no time on a CPU (docs/log.md).
    """

    name = "tensor"

    def __init__(self, model: ModelFacts, *, tp: int) -> None:
        self._model, self._tp = model, tp

    def prepare(self, weights: Weights) -> Prepared:
        """Read and serialize a complete copy of the weights."""
        tensors = self._model.read(weights)
        return Prepared(weights.version, weights.digest, self._model.expected(tensors), self.payloads(tensors))

    def payloads(self, tensors: Mapping[str, torch.Tensor]) -> list[list[bytes]]:
        """The payload of each request, in parts of base64: at most BUCKET_BYTES of tensors, or one tensor."""
        payloads: list[list[bytes]] = []
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in tensors.items():
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                payloads.append(_payload(bucket))
                bucket, size = [], 0
            bucket.append((name, tensor.contiguous().clone()))  # a copy: pickle writes the whole storage
            size += tensor.nbytes
        return [*payloads, _payload(bucket)]

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """Send each payload in a request. The bodies are put together from ready bytes, without a copy."""
        async with weight_update(api, timeout_s):
            for number, payload in enumerate(prepared.payload, 1):
                last = number == len(prepared.payload)
                rest = {
                    "flush_cache": flush and last,
                    "weight_version": str(prepared.version) if last else None,
                }
                ranks = [b'{"serialized_named_tensors": ["', *payload, *[b'", "', *payload] * (self._tp - 1), b'"], ']
                body = [*ranks, json.dumps(rest).encode()[1:]]
                await api.post_encoded("/update_weights_from_tensor", body, timeout_s=timeout_s)


class DiskTransport(Transport):
    """Writes each version to a folder of safetensors, which the servers must be able to read.

    The versions are in a folder of this process below `folder`; if that is "", below the one that `default_root` names.
    """

    name = "disk"

    def __init__(self, model: ModelFacts, folder: str) -> None:
        self._model, self._folder = model, folder
        self._owned: OwnedFolder | None = None
        self._numbers = itertools.count()  # version numbers begin again with each session

    def prepare(self, weights: Weights) -> Prepared:
        """Read a complete copy and write it to disk. Raises EngineError if it cannot be written."""
        tensors = self._model.read(weights)
        path = self.write(weights.version, tensors)
        return Prepared(weights.version, weights.digest, self._model.expected(tensors), path)

    def write(self, version: int, tensors: Mapping[str, torch.Tensor]) -> str:
        """Write a version's folder, renamed when complete; returns its path."""
        target = Path(self._folder or SHARED_MEMORY)
        try:
            target = self._home(sum(tensor.nbytes for tensor in tensors.values())) / f"v{version:06d}"
            target = target.with_name(f"{target.name}-{next(self._numbers)}")
            self._write(tensors, target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(target.with_suffix(".part"), ignore_errors=True)  # its space may be what the disk lacks
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise EngineError(
                f"engine.sglang.folder: cannot write {target} ({reason}); free some space, or set another folder"
            ) from None
        return str(target)

    async def send(self, api: ServerApi, prepared: Prepared, *, flush: bool, timeout_s: float) -> None:
        """Tell the server to load the folder; it keeps its old weights if it cannot."""
        body = {"model_path": prepared.payload, "weight_version": str(prepared.version), "flush_cache": flush}
        await api.post("/update_weights_from_disk", body, timeout_s=timeout_s)

    def release(self, prepared: Prepared) -> None:
        """Remove the version's folder."""
        shutil.rmtree(prepared.payload, ignore_errors=True)

    def close(self) -> None:
        """Remove the folders of all versions."""
        if self._owned is not None:
            self._owned.remove()
            self._owned = None

    def _home(self, nbytes: int) -> Path:
        """The folder of this process; made when it is first needed, for versions of `nbytes`. Raises OSError."""
        if self._owned is None:
            root, reason = (Path(self._folder), "") if self._folder else default_root(nbytes)
            if reason:
                log.info("weights for the SGLang servers are written to %s: %s", root, reason)
            self._owned = OwnedFolder(root, private=not self._folder)
        return self._owned.path

    def _write(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        for name in COPIED:
            if (source := Path(self._model.folder) / name).exists():
                shutil.copyfile(source, folder / name)
        set_usual_modes(folder)  # servers may belong to another user


@asynccontextmanager
async def weight_update(api: ServerApi, timeout_s: float) -> AsyncIterator[None]:
    """Begin a weight update, and end it, also after a failure: a server in an open update refuses to begin another."""
    await api.post("/begin_weight_update", {}, timeout_s=timeout_s)
    try:
        yield
    except SgpoError:
        with contextlib.suppress(ServerRefused, ServerGone):
            await api.post("/end_weight_update", {}, timeout_s=timeout_s)
        raise
    await api.post("/end_weight_update", {}, timeout_s=timeout_s)


def _payload(bucket: list[tuple[str, torch.Tensor]]) -> list[bytes]:
    data = memoryview(pickle.dumps(bucket, protocol=pickle.HIGHEST_PROTOCOL))
    # In parts, as the encoder holds Python's lock, which the loop that carries the streams needs as well.
    return [base64.b64encode(data[start : start + ENCODED]) for start in range(0, len(data), ENCODED)]
