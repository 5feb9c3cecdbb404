"""The requests that the weight sender processes for the actor besides serving weights, each in its own thread.

    RPC thread       `submit`: starts a thread for the request, returns at once
    request thread   processes it; if it hangs in a collective, it is abandoned
    main thread      `expire` at each tick: fails the requests whose deadline has passed

    open(group, backend, world_size) -> (host, port)       rank 0 listens; see `session.broadcast_group`
    join(group)                                            rank 0 has joined the group
    plan(version) -> BroadcastPlan                         see `weights.broadcast_plan`
    broadcast(group, version, fingerprint)                 rank 0 has sent the version (fingerprint: of the plan)
    compute(version, job) -> JSON types                    result of a function of the tensors (`Settings.jobs`)
    close(group)

Every request gets exactly one response, by `respond`. When a request of a group fails, rank 0 leaves the group before
the failure is reported.
"""

from __future__ import annotations

import base64
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from sgpo_async.errors import SessionError, SgpoError, WeightsError
from sgpo_async.session.broadcast_group import Backend, BroadcastGroup
from sgpo_async.session.child_side import one_line
from sgpo_async.session.messages import Request, Response
from sgpo_async.session.rpc_pickler import load_job
from sgpo_async.weights.broadcast_plan import plan_of
from sgpo_async.weights.reader import LazyTensors, StoreReader


class RpcServer:
    """Processes requests about the weights in `store`; it calls `respond` from any of its threads."""

    def __init__(
        self, store: StoreReader, host: str, respond: Callable[[Response], None], *, jobs: Sequence[str]
    ) -> None:
        """The rendezvous of every group listens on `host`; `jobs` are the functions that `compute` may call."""
        self._store, self._host, self._respond, self._jobs = store, host, respond, jobs
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Request, float]] = {}  # by id, with the deadline (monotonic)
        self._groups: dict[str, BroadcastGroup] = {}
        self._computing = threading.Lock()
        self._computed: tuple[int, str, Any] = (-1, "", None)  # last result; several servers request the same one
        self._methods: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "join": self._join,
            "plan": self._plan,
            "broadcast": self._broadcast,
            "compute": self._compute,
            "close": self._close,
        }

    def submit(self, request: Request) -> None:
        """Start to process a request."""
        with self._lock:
            self._pending[request.id] = request, time.monotonic() + request.seconds
        threading.Thread(target=self._process, args=(request,), name=request.method, daemon=True).start()

    def expire(self) -> None:
        """Fail the requests whose deadline has passed."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, deadline in self._pending.values() if deadline < now]
        for request in late:
            message = f"{_subject(request)}: {request.method}: not done within {request.seconds:g} s"
            self._fail(request, SessionError(message))

    def _process(self, request: Request) -> None:
        try:
            response = Response(request.id, self._methods[request.method](request.seconds, **request.arguments))
        except SgpoError as error:
            self._fail(request, error)
        except Exception as error:
            traceback.print_exc()
            message = f"{_subject(request)}: {request.method}: internal error: {error!r}"
            self._fail(request, SessionError(message))
        else:
            if self._finish(request):
                self._respond(response)

    def _fail(self, request: Request, error: SgpoError) -> None:
        if self._finish(request):
            if "group" in request.arguments:
                self._close(0.0, request.arguments["group"])
            self._respond(Response(request.id, error=(type(error).__name__, one_line(str(error)))))

    def _finish(self, request: Request) -> bool:
        """Remove a request; return whether it was still pending: only its first result counts."""
        with self._lock:
            return self._pending.pop(request.id, None) is not None

    def _open(self, seconds: float, group: str, backend: Backend, world_size: int) -> tuple[str, int]:
        self._close(seconds, group)
        opened = BroadcastGroup(group, backend=backend, world_size=world_size, host=self._host, seconds=seconds)
        with self._lock:
            self._groups[group] = opened
        return self._host, opened.port

    def _join(self, seconds: float, group: str) -> None:
        self._group(group).join(seconds)

    def _broadcast(self, seconds: float, group: str, version: int, fingerprint: str) -> None:
        broadcast_group = self._group(group)
        manifest = self._store.manifest_of(version)
        if plan_of(manifest).fingerprint != fingerprint:
            raise WeightsError(
                f"group {group}: broadcast: the tensors of weights version {version} differ from the requested plan; "
                "request the plan again"
            )
        broadcast_group.broadcast(self._store, manifest, seconds)

    def _close(self, _seconds: float, group: str) -> None:
        with self._lock:
            closed = self._groups.pop(group, None)
            blocked = [
                request
                for request, _ in self._pending.values()
                if request.method in ("join", "broadcast") and request.arguments["group"] == group
            ]
        if closed:
            closed.leave()
        for request in blocked:
            self._fail(request, SessionError(f"group {group}: {request.method}: the group was closed meanwhile"))

    def _plan(self, _seconds: float, version: int) -> dict[str, Any]:
        return plan_of(self._store.manifest_of(version)).to_plain()

    def _compute(self, _seconds: float, version: int, job: str) -> Any:
        with self._computing:
            if self._computed[:2] != (version, job):
                function, args, kwargs = load_job(base64.b64decode(job), self._jobs)
                value = function(LazyTensors(self._store, version), *args, **kwargs)
                self._computed = version, job, value
            return self._computed[2]

    def _group(self, name: str) -> BroadcastGroup:
        with self._lock:
            group = self._groups.get(name)
        if group is None:
            raise SessionError(f"group {name}: is not open, or was closed after a failure; open it again")
        return group


def _subject(request: Request) -> str:
    group = request.arguments.get("group")
    return f"group {group}" if group else f"weights version {request.arguments.get('version')}"
