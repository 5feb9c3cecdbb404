"""A Torch RPC world of two processes: joining, calls with timeouts, heartbeats.

Each process asks the other for a heartbeat that is answered a second later, so one call is always in flight in each
direction. When a process is killed, its sockets close and that call fails at once; when it is stopped, the call times
out.

The two processes join by the session's secret: they find each other through an `AuthenticatedStore`, and a
`SessionPickler` checks every message. Torch RPC opens its ports only when the peer has authenticated itself, and they
are closed as soon as the connections stand: no one can connect to a world that has begun.
"""

from __future__ import annotations

import os
import socket
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import rpc

from sgpo_async.errors import SessionError
from sgpo_async.session.authenticated_store import AuthenticatedStore
from sgpo_async.session.rpc_pickler import SessionPickler
from sgpo_async.session.settings import Deadlines

Role = Literal["weight_sender", "weight_receiver"]
_SCHEME = "sgpo-session"  # of the rendezvous, for `init_rpc`
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
            master_listen_fd=listener.detach(),
        )
    return store, port


def heartbeat(seconds: float) -> None:
    """Answer after `seconds`: with a call always in flight, the caller notices at once that this process is gone."""
    time.sleep(seconds)


def echo(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor: then all connections that the transfer of tensors needs stand in both directions."""
    return tensor


def open_no_files() -> torch.library.Library:
    """Let torch's operator that reads any file refuse, as long as the result lives.

    The peer can call every builtin operator of torch, past all that is written in Python (docs/security.md).
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("aten::from_file is not allowed in a session")

    operators = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # about the override
        operators.impl("from_file", refuse, "CPU")
    return operators


def open_ports() -> list[int]:
    """The descriptors at which this process accepts TCP connections."""
    return [number for name in os.listdir("/proc/self/fd") if _is_listening(number := int(name))]  # noqa: PTH208


def close_ports(numbers: Sequence[int]) -> None:
    """Close these ports, which libraries of this process have opened.

    They themselves would not: they accept whoever comes, for as long as the process lives. In their place their
    descriptors get /dev/null, of which no events come.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        os.dup2(null, number, inheritable=False)
    os.close(null)


def _is_listening(number: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return False
        with socket.socket(fileno=os.dup(number)) as found:
            internet = found.family in (socket.AF_INET, socket.AF_INET6)
            return internet and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # closed meanwhile
        return False


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
    """This process's membership in a world of two: `listen` or `reach`, then `join`."""

    def __init__(
        self, role: Role, deadlines: Deadlines, *, secret: bytes, from_peer: Sequence[Callable[..., Any]]
    ) -> None:
        """The peer must know the session's `secret`; `from_peer`: functions and classes that its messages may name."""
        self.peer: Role = "weight_receiver" if role == "weight_sender" else "weight_sender"
        self._role, self._deadlines, self._secret = role, deadlines, secret
        self._heartbeat: Call | None = None
        self._pickler = SessionPickler(secret, (*from_peer, heartbeat, echo))

    def listen(self, host: str) -> int:
        """Open the rendezvous at a free port of `host` only; return the port."""
        self._rendezvous, port = listen(host, self._deadlines.join_s)
        return port

    def reach(self, host: str, port: int) -> None:
        """Connect to the rendezvous that the peer has opened there."""
        timeout = timedelta(seconds=self._deadlines.join_s)
        self._rendezvous = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)

    def join(self) -> None:
        """Wait for the peer to join; the caller enforces the deadline."""
        self._pickler.install()
        self._operators = open_no_files()
        # Kept, because torch does not keep the Python half of a store.
        self._store = rendezvous = AuthenticatedStore(self._rendezvous, self._secret)
        if self._role == "weight_sender":
            rendezvous.wait_until_set("here")
        else:
            rendezvous.set("here", b"")
        dist.register_rendezvous_handler(_SCHEME, lambda *_, **__: iter([(rendezvous, _RANK[self._role], 2)]))
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_THREADS,
            rpc_timeout=self._deadlines.join_s,  # of the handshake; every call below has its own timeout
            init_method=f"{_SCHEME}://",
            _transports=_TRANSPORTS,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # caused inside `init_rpc`
            rpc.init_rpc(self._role, rank=_RANK[self._role], world_size=2, rpc_backend_options=options)
        self._pickler.check_used()
        self._begin(self._deadlines.join_s, echo, torch.ones(1)).wait()
        ports = open_ports()  # before the peer can ask for weight-update groups, whose ports must stay open
        rendezvous.set(f"{self._role} is connected", b"")
        rendezvous.wait_until_set(f"{self.peer} is connected")
        close_ports(ports)

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
