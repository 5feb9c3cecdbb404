"""Rank 0 of one weight-update group; ranks 1 to `world_size` - 1 are the tensor-parallel ranks of one SGLang server.

    listen      a rendezvous (TCPStore) on the session's host; servers join it by address
    join        gloo: connects every member to every other; nccl: nothing yet, the first broadcast connects
    broadcast   one version, piece by piece (`weights.broadcast_plan`): piece i + 1 is read while piece i is under way
    leave       frees whoever waits for us: a rendezvous or connection that closes ends the others' wait

What SGLang does at its end (`init_custom_process_group` in sglang/srt/utils/common.py, 0.5.23): the rendezvous's
store below the prefix GROUP, then torch's `_new_process_group_helper`, which adds GROUP/ and DEVICE/. Its waits last up
to 30 minutes, and its scheduler stands still meanwhile: so rank 0 leaves as soon as anything fails.

A collective cannot be cancelled. Here it is given up at its deadline (gloo ends by itself then; nccl is aborted by
a thread that may hang for as long as it likes), and the group is never used again. The nccl half is written after
torch's source and has not been run on GPUs.
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
Content = tuple[str, str, tuple[int, ...], bytes]  # what `combine` takes
_DEVICE = {"gloo": "cpu", "nccl": "cuda"}


class BroadcastGroup:
    """One member of one group. `join` and `broadcast` block; `leave` does not, and may be called by any thread."""

    def __init__(self, name: str, *, backend: Backend, world_size: int, host: str, seconds: float) -> None:
        """Listen on `host` at a free `port`. Raises SessionError if that cannot be, or `backend` has no device."""
        self.name, self._backend, self._world_size, self._host = name, backend, world_size, host
        self._members: Any = None  # the process group, once joined
        with self._phase("listen"):
            if backend == "nccl" and not torch.cuda.is_available():
                raise RuntimeError("nccl needs a GPU beside the learner that the link may use; ask for gloo")
            self._rendezvous: Any
            self._rendezvous, self.port = listen(host, seconds)

    def join(self, seconds: float) -> None:
        """Meet the other ranks. Raises SessionError if they do not all come in time, or `leave` is called."""
        with self._phase("join"):
            timeout = timedelta(seconds=seconds)
            # A client of its own, so that closing the rendezvous ends this very wait too.
            store: dist.Store = dist.TCPStore(
                self._host, self.port, is_master=False, timeout=timeout, wait_for_workers=False
            )
            for prefix in (self.name, f"{self.name}/", f"{_DEVICE[self._backend]}/"):
                store = dist.PrefixStore(prefix, store)
            members = _process_group(self._backend, store, self._world_size, timeout)
            if self._rendezvous is None:
                raise RuntimeError("the group was left meanwhile")
            self._members = members

    def broadcast(self, store: StoreReader, manifest: Manifest, seconds: float) -> None:
        """Send every tensor of the version. That it is sent does not mean that it has been received: ask the server.

        Raises Superseded if the version is overwritten meanwhile, WeightsError if what was sent does not have
        its digest, SessionError if a member is gone or it takes longer than `seconds`.
        """
        with self._phase("broadcast"):
            ends = time.monotonic() + seconds
            pieces = list(cut(manifest.tensors))
            largest = max(sum(t.nbytes for t in piece) for piece in pieces)
            buffers = cycle([torch.empty(largest, dtype=torch.uint8) for _ in pieces[:2]])
            contents: list[Content] = []
            under_way = None
            try:
                for piece, buffer in zip(pieces, buffers, strict=False):
                    data = buffer[: sum(t.nbytes for t in piece)]
                    store.copy(manifest.version, piece, data.numpy().data)
                    if under_way is not None:
                        _finish(under_way, ends)
                    under_way = self._send(data)
                    contents += _contents(piece, data.numpy().data)
                _finish(under_way, ends)
            finally:
                # Its connections stay open as long as anything holds it, and a traceback holds this frame.
                del under_way
            if combine(contents) != manifest.digest:
                raise WeightsError(f"weights version {manifest.version}: what was sent does not have its digest")

    def leave(self) -> None:
        """Close the rendezvous and all connections, without waiting."""
        self._rendezvous = None
        held, self._members = [self._members], None
        threading.Thread(target=_abandon, args=(held,), name=f"leave {self.name}", daemon=True).start()

    def _send(self, data: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        members = self._members
        if members is None:
            raise RuntimeError("the group has not joined, or was left")
        return members.broadcast([data.to(_DEVICE[self._backend])], options)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        try:
            yield
        except SgpoError as error:
            raise type(error)(f"group {self.name}: {name}: {error}") from error
        except (RuntimeError, OSError) as error:
            first_line = str(error).partition("\n")[0]
            raise SessionError(f"group {self.name}: {name}: {first_line}") from error


def _process_group(backend: Backend, store: Any, world_size: int, timeout: timedelta) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, 0, world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, 0, world_size, options)


def _abandon(held: list[Any]) -> None:
    """End the process group in `held`, the only place that holds it: its destructor waits for what is under way."""
    members = held.pop()
    if members is not None:
        members.abort()


def _contents(piece: list[TensorEntry], data: memoryview) -> Iterator[Content]:
    for tensor in piece:
        yield tensor.name, tensor.dtype, tensor.shape, xxhash.xxh3_128_digest(data[: tensor.nbytes])
        data = data[tensor.nbytes :]


def _finish(work: Any, ends: float) -> None:
    """Wait for a broadcast. Raises RuntimeError if it fails, or is not done at `ends`."""
    work.wait(timedelta(seconds=max(0.001, ends - time.monotonic())))
