"""A Torch RPC world of two: meeting, calls with deadlines, signs of life.

Both sides ask each other for a sign of life that is answered a second later, so one call is always under way
in each direction. When a process is killed, its sockets close and that call fails at once; when it is
stopped, the call runs into its deadline.
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

Role = Literal["link", "node"]
_RANK = {"link": 0, "node": 1}
_TRANSPORTS = ["uv"]  # TCP. The others poll without rest: shared memory took 10 to 20 % of a core while idle
_THREADS = 8  # of the callee: one is asleep in `beat`, four serve the buckets that are under way


def listen(host: str, join_s: float) -> tuple[dist.TCPStore, int]:
    """Open the rendezvous on `host` alone, at a free port; keep the store as long as the world lives."""
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
            multi_tenant=True,  # `init_rpc` finds this server by its port instead of opening another
            master_listen_fd=listener.detach(),
        )
    return store, port


def beat(seconds: float) -> None:
    """Answer after `seconds`. So a call is always under way, and fails at once when the peer is gone."""
    time.sleep(seconds)


class Call:
    """One call that is under way."""

    def __init__(self, what: str, seconds: float, begin: Callable[[], torch.futures.Future[Any]]) -> None:
        """`what` names function and callee."""
        self._what, self._seconds = what, seconds
        with self._named():
            self._future = begin()

    def done(self) -> bool:
        """Whether `wait` returns or raises at once."""
        return bool(self._future.done())

    def wait(self) -> Any:
        """The answer. Raises SessionError if the peer gives none in time, or is gone."""
        with self._named():
            return self._future.wait()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            late, first_line = "timeout" in str(error), str(error).partition("\n")[0]
            fault = f"gave no answer within {self._seconds:g} s" if late else f"is gone ({first_line})"
            raise SessionError(f"{self._what} {fault}") from error


class RpcWorld:
    """This process's membership in a world of two."""

    def __init__(self, role: Role, deadlines: Deadlines) -> None:
        self.peer: Role = "node" if role == "link" else "link"
        self._role, self._deadlines = role, deadlines
        self._beat: Call | None = None

    def join(self, host: str, port: int) -> None:
        """Meet the peer; the caller sets the deadline."""
        address = f"[{host}]" if ":" in host else host
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_THREADS,
            rpc_timeout=self._deadlines.join_s,  # of the handshake; every call below has its own
            init_method=f"tcp://{address}:{port}",
            _transports=_TRANSPORTS,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # init_rpc's own doing
            rpc.init_rpc(self._role, rank=_RANK[self._role], world_size=2, rpc_backend_options=options)

    def begin(self, function: Callable[..., Any], *args: Any) -> Call:
        """Call `function` on the peer without waiting. Raises SessionError if the peer is gone already."""
        return self._begin(self._deadlines.call_s, function, *args)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on the peer and wait for the answer. Raises SessionError if there is none."""
        return self.begin(function, *args).wait()

    def check(self) -> None:
        """Raise SessionError if the peer shows no sign of life."""
        if self._beat is not None and not self._beat.done():
            return
        if self._beat is not None:
            self._beat.wait()
        beat_s = self._deadlines.beat_s
        self._beat = self._begin(beat_s + self._deadlines.call_s, beat, beat_s)

    def _begin(self, seconds: float, function: Callable[..., Any], *args: Any) -> Call:
        what = f"{function.__name__}: the {self.peer}"
        return Call(what, seconds, lambda: rpc.rpc_async(self.peer, function, args=args, timeout=seconds))
