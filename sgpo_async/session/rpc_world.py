"""A Torch RPC world of two processes: joining, calls with timeouts, heartbeats.

Each process asks the other for a heartbeat that is answered a second later, so one call is always in flight in each
direction. When a process is killed, its sockets close and that call fails at once; when it is stopped, the call times
out.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import rpc

from sgpo_async.errors import SessionError
from sgpo_async.session.settings import Deadlines

Role = Literal["weight_sender", "weight_receiver"]
_RANK = {"weight_sender": 0, "weight_receiver": 1}
_TRANSPORTS = ["uv"]  # TCP. The other transports poll all the time: shared memory took 10 to 20 % of a core while idle
_THREADS = 8  # of the callee: one sleeps in `heartbeat`, four serve the buckets in flight


def listen(host: str, join_s: float) -> tuple[dist.TCPStore, int]:
    """Open a rendezvous at a free port of `host` only; keep the store as long as the world lives."""
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.bind(address)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            world_size=2,
            is_master=True,
            timeout=timedelta(seconds=join_s),
            wait_for_workers=False,
            multi_tenant=True,  # `init_rpc` finds this server by its port and does not open another one
            master_listen_fd=listener.detach(),
        )
    return store, port


def heartbeat(seconds: float) -> None:
    """Answer after `seconds`: with a call always in flight, the caller notices at once that this process is gone."""
    time.sleep(seconds)


class Call:
    """One call that is in flight."""

    def __init__(self, description: str, seconds: float, begin: Callable[[], torch.futures.Future[Any]]) -> None:
        """`description` names function and callee."""
        self._description, self._seconds = description, seconds
        with self._named():
            self._future = begin()

    def done(self) -> bool:
        """Return whether `wait` would return or raise at once."""
        return bool(self._future.done())

    def wait(self) -> Any:
        """Return the answer. Raises SessionError if the peer does not answer in time, or is gone."""
        with self._named():
            return self._future.wait()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            timed_out, first_line = "timeout" in str(error), str(error).partition("\n")[0]
            failure = f"did not answer within {self._seconds:g} s" if timed_out else f"is gone ({first_line})"
            raise SessionError(f"{self._description} {failure}") from error


class RpcWorld:
    """This process's membership in a world of two."""

    def __init__(self, role: Role, deadlines: Deadlines) -> None:
        self.peer: Role = "weight_receiver" if role == "weight_sender" else "weight_sender"
        self._role, self._deadlines = role, deadlines
        self._heartbeat: Call | None = None

    def join(self, host: str, port: int) -> None:
        """Wait for the peer to join; the caller enforces the deadline."""
        address = f"[{host}]" if ":" in host else host
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_THREADS,
            rpc_timeout=self._deadlines.join_s,  # of the handshake; every call below has its own timeout
            init_method=f"tcp://{address}:{port}",
            _transports=_TRANSPORTS,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # caused inside `init_rpc`
            rpc.init_rpc(self._role, rank=_RANK[self._role], world_size=2, rpc_backend_options=options)

    def begin(self, function: Callable[..., Any], *args: Any) -> Call:
        """Call `function` on the peer without waiting. Raises SessionError if the peer is already gone."""
        return self._begin(self._deadlines.call_s, function, *args)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on the peer and wait for the answer. Raises SessionError if there is none."""
        return self.begin(function, *args).wait()

    def check(self) -> None:
        """Raise SessionError if the peer has not answered the last heartbeat in time, or is gone."""
        if self._heartbeat is not None and not self._heartbeat.done():
            return
        if self._heartbeat is not None:
            self._heartbeat.wait()
        heartbeat_s = self._deadlines.heartbeat_s
        self._heartbeat = self._begin(heartbeat_s + self._deadlines.call_s, heartbeat, heartbeat_s)

    def _begin(self, seconds: float, function: Callable[..., Any], *args: Any) -> Call:
        description = f"{function.__name__}: the {self.peer.replace('_', ' ')}"
        return Call(description, seconds, lambda: rpc.rpc_async(self.peer, function, args=args, timeout=seconds))
