"""Rank 0 of one weight-update group; the other ranks are those of an actor's SGLang servers.

    listen      open a rendezvous (TCPStore) on the session's host; the servers join by its address
    join        gloo: connect every rank to every other; nccl: nothing yet, the first broadcast connects
    broadcast   send one version, piece by piece (`weights.broadcast_plan`): piece i + 1 is read while piece i is sent
    leave       close the rendezvous and all connections; this ends the waits of the other ranks

How SGLang joins (`init_custom_process_group` in sglang/srt/utils/common.py, 0.5.23): it uses the rendezvous's store
below the prefix GROUP, then calls torch's `_new_process_group_helper`, which adds the prefixes GROUP/ and DEVICE/. Its
waits last up to 30 minutes and block its scheduler. Rank 0 therefore leaves as soon as anything fails.

A collective cannot be cancelled. At its deadline rank 0 abandons it (gloo then ends by itself; nccl is aborted by a
thread that may hang indefinitely) and never uses the group again. The nccl half is written after torch's source and
has not been run on GPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import cycle
from typing import Any, Literal

import torch
import torch.distributed as dist
import xxhash

from sgpo_async.errors import SessionError, SgpoError, WeightsError
from sgpo_async.session.rpc_world import listen
from sgpo_async.weights.broadcast_plan import cut
from sgpo_async.weights.digest import combine
from sgpo_async.weights.manifest import Manifest, TensorEntry
from sgpo_async.weights.reader import StoreReader

Backend = Literal["gloo", "nccl"]
TensorDigest = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, digest of the bytes: input of `combine`
_DEVICE = {"gloo": "cpu", "nccl": "cuda"}


class BroadcastGroup:
    """Rank 0 of one group. `join` and `broadcast` block; `leave` does not block, and any thread may call it."""

    def __init__(self, name: str, *, backend: Backend, world_size: int, host: str, seconds: float) -> None:
        """Listen on `host` at a free `port`. Raises SessionError if that fails, or if `backend` has no device."""
        self.name, self._backend, self._world_size, self._host = name, backend, world_size, host
        self._process_group: Any = None  # set by `join`
        with self._phase("listen"):
            if backend == "nccl" and not torch.cuda.is_available():
                raise RuntimeError(
                    "backend nccl needs a GPU on the hub's machine that the weight sender may use; use gloo"
                )
            self._rendezvous: Any
            self._rendezvous, self.port = listen(host, seconds)

    def join(self, seconds: float) -> None:
        """Wait for the other ranks. Raises SessionError if one of them does not join in time, or `leave` is called."""
        with self._phase("join"):
            timeout = timedelta(seconds=seconds)
            # A separate client of the store, so that closing the rendezvous ends this wait too.
            store: dist.Store = dist.TCPStore(
                self._host, self.port, is_master=False, timeout=timeout, wait_for_workers=False
            )
            for prefix in (self.name, f"{self.name}/", f"{_DEVICE[self._backend]}/"):
                store = dist.PrefixStore(prefix, store)
            process_group = _new_process_group(self._backend, store, self._world_size, timeout)
            if self._rendezvous is None:
                raise RuntimeError("rank 0 left the group during the join")
            self._process_group = process_group

    def broadcast(self, store: StoreReader, manifest: Manifest, seconds: float) -> None:
        """Send every tensor of the version. A return does not prove that the server received it: ask the server.

        Raises Superseded if the learner overwrites the version during the broadcast, WeightsError if the bytes sent
        do not match the digest in the manifest, SessionError if a rank is lost or the broadcast takes longer than
        `seconds`.
        """
        with self._phase("broadcast"):
            deadline = time.monotonic() + seconds
            pieces = list(cut(manifest.tensors))
            largest = max(sum(t.nbytes for t in piece) for piece in pieces)
            buffers = cycle([torch.empty(largest, dtype=torch.uint8) for _ in pieces[:2]])
            digests: list[TensorDigest] = []
            in_flight = None
            try:
                for piece, buffer in zip(pieces, buffers, strict=False):
                    data = buffer[: sum(t.nbytes for t in piece)]
                    store.copy(manifest.version, piece, data.numpy().data)
                    if in_flight is not None:
                        _wait(in_flight, deadline)
                    in_flight = self._send(data)
                    digests += _tensor_digests(piece, data.numpy().data)
                _wait(in_flight, deadline)
            finally:
                # Any reference to it keeps its connections open, and a traceback would keep this frame's.
                del in_flight
            if combine(digests) != manifest.digest:
                raise WeightsError(
                    f"weights version {manifest.version}: the bytes sent do not match the digest in its manifest"
                )

    def leave(self) -> None:
        """Close the rendezvous and all connections, without waiting."""
        self._rendezvous = None
        owner, self._process_group = [self._process_group], None
        threading.Thread(target=_abort, args=(owner,), name=f"leave {self.name}", daemon=True).start()

    def _send(self, data: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        process_group = self._process_group
        if process_group is None:
            raise RuntimeError("rank 0 has not joined the group, or has left it")
        return process_group.broadcast([data.to(_DEVICE[self._backend])], options)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Name the group and the phase in every error of the body."""
        try:
            yield
        except SgpoError as error:
            raise type(error)(f"group {self.name}: {name}: {error}") from error
        except (RuntimeError, OSError) as error:
            first_line = str(error).partition("\n")[0]
            raise SessionError(f"group {self.name}: {name}: {first_line}") from error


def _new_process_group(backend: Backend, store: Any, world_size: int, timeout: timedelta) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, 0, world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, 0, world_size, options)


def _abort(owner: list[Any]) -> None:
    """Abort the process group in `owner`, which holds its only reference: its destructor waits for running work."""
    process_group = owner.pop()
    if process_group is not None:
        process_group.abort()


def _tensor_digests(piece: list[TensorEntry], data: memoryview) -> Iterator[TensorDigest]:
    for tensor in piece:
        yield tensor.name, tensor.dtype, tensor.shape, xxhash.xxh3_128_digest(data[: tensor.nbytes])
        data = data[tensor.nbytes :]


def _wait(work: Any, deadline: float) -> None:
    """Wait for a broadcast. Raises RuntimeError if it fails, or has not finished at `deadline` (monotonic)."""
    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
