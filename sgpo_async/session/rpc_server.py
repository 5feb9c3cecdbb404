"""What the link does for the actor besides serving weights: each question in a thread of its own.

    RPC thread     `take`: starts a thread for the question, returns at once
    its thread     does it; may hang in a collective, and is then left behind
    main thread    `expire` at each tick: fails what has no answer in time

    open(group, backend, world_size) -> (host, port)       rank 0 listens; see `session.broadcast_group`
    join(group)                                            the group stands
    plan(version) -> BroadcastPlan                                  see `weights.broadcast_plan`
    broadcast(group, version, fingerprint)                 rank 0 has sent the version of this very plan
    compute(version, job) -> JSON types                    of a pickled function of the tensors
    close(group)

Every question has one answer, told by `tell`. A group in which anything fails is left before the failure is told.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from sgpo_async.errors import SessionError, SgpoError, WeightsError
from sgpo_async.session.broadcast_group import Backend, BroadcastGroup
from sgpo_async.session.child_side import one_line
from sgpo_async.session.messages import Answer, Ask
from sgpo_async.weights.broadcast_plan import plan_of
from sgpo_async.weights.reader import LazyTensors, StoreReader


class RpcServer:
    """Answers questions about the weights in `store` by `tell`, which any thread may call."""

    def __init__(self, store: StoreReader, host: str, tell: Callable[[Answer], None]) -> None:
        """`host` is where the rendezvous of groups listen."""
        self._store, self._host, self._tell = store, host, tell
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Ask, float]] = {}  # with the time (monotonic) when it fails
        self._groups: dict[str, BroadcastGroup] = {}
        self._computing = threading.Lock()
        self._computed: tuple[int, str, Any] = (-1, "", None)  # the last one: the servers of a node ask the same
        self._answers: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "join": self._join,
            "plan": self._plan,
            "broadcast": self._broadcast,
            "compute": self._compute,
            "close": self._close,
        }

    def take(self, ask: Ask) -> None:
        """Begin with a question."""
        with self._lock:
            self._pending[ask.id] = ask, time.monotonic() + ask.seconds
        threading.Thread(target=self._work, args=(ask,), name=ask.what, daemon=True).start()

    def expire(self) -> None:
        """Fail the questions whose time is over."""
        now = time.monotonic()
        with self._lock:
            late = [ask for ask, expires in self._pending.values() if expires < now]
        for ask in late:
            self._fail(ask, SessionError(f"{_subject(ask)}: {ask.what}: not done within {ask.seconds:g} s"))

    def _work(self, ask: Ask) -> None:
        try:
            answer = Answer(ask.id, self._answers[ask.what](ask.seconds, **ask.arguments))
        except SgpoError as error:
            self._fail(ask, error)
        except Exception as error:
            traceback.print_exc()
            self._fail(ask, SessionError(f"{_subject(ask)}: {ask.what}: internal error: {error!r}"))
        else:
            if self._settle(ask):
                self._tell(answer)

    def _fail(self, ask: Ask, error: SgpoError) -> None:
        if self._settle(ask):
            if "group" in ask.arguments:
                self._close(0.0, ask.arguments["group"])
            self._tell(Answer(ask.id, error=(type(error).__name__, one_line(str(error)))))

    def _settle(self, ask: Ask) -> bool:
        """Whether it was still open: the first outcome counts."""
        with self._lock:
            return self._pending.pop(ask.id, None) is not None

    def _open(self, seconds: float, group: str, backend: Backend, world_size: int) -> tuple[str, int]:
        self._close(seconds, group)
        opened = BroadcastGroup(group, backend=backend, world_size=world_size, host=self._host, seconds=seconds)
        with self._lock:
            self._groups[group] = opened
        return self._host, opened.port

    def _join(self, seconds: float, group: str) -> None:
        self._of(group).join(seconds)

    def _broadcast(self, seconds: float, group: str, version: int, fingerprint: str) -> None:
        own = self._of(group)
        manifest = self._store.manifest_of(version)
        if plan_of(manifest).fingerprint != fingerprint:
            raise WeightsError(
                f"group {group}: broadcast: weights version {version} has other tensors than were asked for; "
                "ask for its plan again"
            )
        own.broadcast(self._store, manifest, seconds)

    def _close(self, _seconds: float, group: str) -> None:
        with self._lock:
            own = self._groups.pop(group, None)
            others = [
                ask
                for ask, _ in self._pending.values()
                if ask.what in ("join", "broadcast") and ask.arguments["group"] == group
            ]
        if own:
            own.leave()
        for ask in others:
            self._fail(ask, SessionError(f"group {group}: {ask.what}: the group was left meanwhile"))

    def _plan(self, _seconds: float, version: int) -> dict[str, Any]:
        return plan_of(self._store.manifest_of(version)).to_plain()

    def _compute(self, _seconds: float, version: int, job: str) -> Any:
        with self._computing:
            if self._computed[:2] != (version, job):
                function, args, kwargs = pickle.loads(base64.b64decode(job))  # as Torch RPC does with everything
                value = function(LazyTensors(self._store, version), *args, **kwargs)
                self._computed = version, job, value
            return self._computed[2]

    def _of(self, name: str) -> BroadcastGroup:
        with self._lock:
            group = self._groups.get(name)
        if group is None:
            raise SessionError(f"group {name}: is not open, or was left after a failure; open it anew")
        return group


def _subject(ask: Ask) -> str:
    group = ask.arguments.get("group")
    return f"group {group}" if group else f"weights version {ask.arguments.get('version')}"
