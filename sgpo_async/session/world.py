"""A Torch RPC world of two: meeting, calls with deadlines, signs of life."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed import rpc

from sgpo_async.errors import SessionError
from sgpo_async.session import calls
from sgpo_async.session.settings import Deadlines

Role = Literal["link", "node"]
_RANK = {"link": 0, "node": 1}
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


class World:
    """This process's membership in a world of two."""

    def __init__(self, role: Role, who: str, deadlines: Deadlines) -> None:
        self.peer: Role = "node" if role == "link" else "link"
        self._role, self._who, self._deadlines = role, who, deadlines
        self._beat: Any = None

    def join(self, host: str, port: int) -> None:
        """Meet the peer; the caller sets the deadline."""
        address = f"[{host}]" if ":" in host else host
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_THREADS,
            rpc_timeout=self._deadlines.join_s,  # of the handshake; every call below has its own
            init_method=f"tcp://{address}:{port}",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using a Backend")  # init_rpc's own doing
            rpc.init_rpc(self._role, rank=_RANK[self._role], world_size=2, rpc_backend_options=options)
        self._beat = self._start_beat()

    def begin(self, function: Callable[..., Any], *args: Any, extra_s: float = 0.0) -> Callable[[], Any]:
        """Call `function` on the peer; the result waits for the answer. It raises SessionError if there is none."""
        name, seconds = function.__name__, self._deadlines.call_s + extra_s
        try:
            future = rpc.rpc_async(self.peer, function, args=args, timeout=seconds)
        except RuntimeError as error:
            raise self._lost(name, seconds, error) from error

        def wait() -> Any:
            try:
                return future.wait()
            except RuntimeError as error:
                raise self._lost(name, seconds, error) from error

        wait.done = future.done  # type: ignore[attr-defined]
        return wait

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on the peer and wait for the answer. Raises SessionError if there is none."""
        return self.begin(function, *args)()

    def check(self) -> None:
        """Raise SessionError if the peer shows no sign of life."""
        if self._beat.done():
            self._beat()
            self._beat = self._start_beat()

    def _start_beat(self) -> Any:
        return self.begin(calls.beat, self._deadlines.beat_s, extra_s=self._deadlines.beat_s)

    def _lost(self, phase: str, seconds: float, error: RuntimeError) -> SessionError:
        text = str(error).splitlines()[0]
        what = f"no answer within {seconds:g} s" if "timeout" in text else f"gone ({text})"
        return SessionError(f"{self._who}: {phase}: the {self.peer} is {what}".replace("is no answer", "gave no answer"))
