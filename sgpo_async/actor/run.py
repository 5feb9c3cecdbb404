"""An actor from start to end: find the hub, load the engine, serve one session after another.

    settings ─▶ engine (stays warm) ─▶ ┌ Hello ─▶ Welcome ─▶ receiver ─▶ serve ────┐
        ▲                              └────────────── session ended ◀─────────────┘
        └──────────────────────────────── backoff ◀──────────┘

The actor asks for the configuration before it joins: loading a model may take minutes, and the hub would take a member
that is silent for so long for dead. The engine outlives sessions. When the hub goes away, the actor looks for it until
it is back.

A refusal ends an actor that has never served. After a session it may be temporary (the network broke, and the hub still
counts the actor's name as a living member): then the actor retries for `hub_timeout_s`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sgpo_async.actor.service import Service
from sgpo_async.config import Engine as EngineSettings
from sgpo_async.config import Model, Run, from_plain
from sgpo_async.engines.base import Engine
from sgpo_async.engines.open import open_engine
from sgpo_async.errors import HubError, Refusal
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint
from sgpo_async.session import Deadlines, WeightReceiver
from sgpo_async.session.interface import interface_towards
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.wire.records import Hello, Message, Refused, Settings, SettingsRequest, Stop, Welcome

log = logging.getLogger(__name__)

WELCOME_DEADLINE_S = 180.0  # the hub starts a weight sender first, on a machine that may be busy
Answer = TypeVar("Answer", Settings, Welcome)
MAX_BYTES = 2**30  # the hub's limit, hub.max_message_mb, is smaller
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """What an inference node decides for itself; everything else comes from the hub."""

    hub: str
    name: str = ""
    keys: str = ""
    model: str = ""  # a local copy, where the run's model.path does not resolve on this node
    slots: int = 0  # 0: as the run says
    servers: int = 0  # SGLang servers to launch, also where the run attaches to URLs; 0: as the run says
    tp: int = 0  # tensor parallel ranks of each server; 0: as the run says
    device: str = ""  # "": as the run says
    sglang_python: str = ""  # of SGLang's environment; "": as the run says
    sglang_urls: tuple[str, ...] = ()  # servers to attach to; none: as the run says
    logs: str = ""  # folder of the servers' logs; "": a temporary one
    hub_timeout_s: float = 120.0  # how long to look for the hub before giving up


class Actor:
    """One inference node.

    Raises HubError if no hub is found or it refuses the actor; EngineError or DataError if the model cannot be served.
    """

    def __init__(self, options: ActorOptions) -> None:
        self._options = options
        self._name = options.name or f"actor-{uuid.uuid4().hex[:6]}"
        self._stopped = False
        self._served_until: float | None = None  # when the last session ended, if there has been one
        self._warm_for: tuple[Model, EngineSettings] | None = None
        self._engine: Engine | None = None
        self._tokenizer: Any = None

    def run(self) -> int:
        """Serve until the run is over or a signal arrives; returns the exit status, 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            failures = 0
            while not self._stopped:
                began = time.monotonic()
                self._dealer = Dealer(self._options.hub, keys=self._options.keys, max_bytes=MAX_BYTES)
                mailbox = Mailbox(self._dealer)
                try:
                    if self._session(mailbox):
                        break
                except Refusal as refusal:
                    if not self._may_pass(refusal):
                        raise
                    log.warning("%s", refusal)
                finally:
                    mailbox.close(linger_s=1.0)  # the last releases and the goodbye are still to be sent
                failures = 0 if time.monotonic() - began > 2 * BACKOFF_S[-1] else failures + 1
                self._pause(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
        finally:
            if self._engine is not None:
                self._engine.close()
        return 0

    def _may_pass(self, refusal: Refusal) -> bool:
        served = self._served_until
        return not refusal.final and served is not None and time.monotonic() - served < self._options.hub_timeout_s

    def _session(self, mailbox: Mailbox) -> bool:
        """One connection to one hub, from its settings to its end; returns whether the run is over."""
        settings = self._ask(mailbox, SettingsRequest(), Settings, self._options.hub_timeout_s, again_s=1.0)
        if settings is None:
            return True
        run = self._with_own_options(from_plain(settings.settings))
        node = self._node(run)
        try:
            return self._join(mailbox, node, run)
        finally:
            node.stop()

    def _node(self, run: Run) -> WeightReceiver:
        """Start the weight receiver now: it imports torch while this process loads the engine."""
        deadlines = Deadlines(group_s=run.engine.sglang.phase_timeout_s)
        return WeightReceiver(self._name, pulls=not run.engine.broadcasts, deadlines=deadlines)

    def _join(self, mailbox: Mailbox, node: WeightReceiver, run: Run) -> bool:
        engine = self._warm(run)
        hello = Hello(role="actor", name=self._name, tokenizer=tokenizer_fingerprint(self._tokenizer))
        welcome = self._ask(mailbox, hello, Welcome, WELCOME_DEADLINE_S)
        if welcome is None:
            return True
        node.connect(welcome.session_host, welcome.session_port)
        service = Service(
            mailbox=mailbox,
            node=node,
            engine=engine,
            tokenizer=self._tokenizer,
            run=run,
        )
        reason = service.serve(stopping=lambda: self._stopped)
        self._served_until = time.monotonic()
        log.info("%s: session ended: %s", self._name, reason)
        return service.finished

    def _with_own_options(self, run: Run) -> Run:
        own = self._options
        return replace(
            run,
            model=replace(run.model, path=own.model or run.model.path),
            engine=replace(
                run.engine,
                slots=own.slots or run.engine.slots,
                device=own.device or run.engine.device,  # type: ignore[arg-type]
                sglang=replace(
                    run.engine.sglang,
                    python=own.sglang_python or run.engine.sglang.python,
                    servers=own.servers or run.engine.sglang.servers,
                    tp=own.tp or run.engine.sglang.tp,
                    urls=list(own.sglang_urls) or ([] if own.servers else run.engine.sglang.urls),
                ),
            ),
        )

    def _warm(self, run: Run) -> Engine:
        """The engine; it is loaded again only if the run's model or engine settings have changed."""
        if self._engine is not None and self._warm_for == (run.model, run.engine):
            return self._engine
        if self._engine is not None:
            self._engine.close()
        began = time.monotonic()
        folder = model_folder(run.model.path)
        self._tokenizer = load_tokenizer(folder)
        build_prompt("?", None, style=run.tasks.prompt, tokenizer=self._tokenizer)  # fail early
        self._engine = self._open_engine(folder, run)
        self._warm_for = run.model, run.engine
        log.info("%s: engine ready after %.1f s", self._name, time.monotonic() - began)
        return self._engine

    def _open_engine(self, folder: str, run: Run) -> Engine:
        if run.engine.broadcasts:  # servers inherit the name of the interface towards the learner
            host = self._options.hub.removeprefix("tcp://").rpartition(":")[0]
            for backend in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface_towards(host))
        return open_engine(run, folder, logs=self._options.logs, name=self._name, stopping=lambda: self._stopped)

    def _ask(
        self, mailbox: Mailbox, question: Message, answer: type[Answer], deadline_s: float, *, again_s: float = 0.0
    ) -> Answer | None:
        """Send `question`, wait for its answer and return it; None if the actor is told to stop.

        With `again_s` the question is repeated every so many seconds.
        """
        began = asked = time.monotonic()
        mailbox.send(question)
        while not self._stopped:
            for message in mailbox.receive(0.1):
                if isinstance(message, answer):
                    return message
                if isinstance(message, Refused):
                    reason = f"hub {self._options.hub}: refused {self._name}: {message.reason}"
                    raise Refusal(reason, final=message.final)
                if isinstance(message, Stop):
                    return None
            self._dealer.check_refused()
            now = time.monotonic()
            if now - began > deadline_s:
                raise HubError(
                    f"hub {self._options.hub}: no {answer.__name__} within {deadline_s:g} s; "
                    "check that the hub runs, and the address"
                )
            if again_s and now - asked > again_s:
                if asked == began:
                    log.info("%s: no answer from %s yet; waiting up to %g s", self._name, self._options.hub, deadline_s)
                asked = now
                mailbox.send(question)
        return None

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopped and time.monotonic() < until:
            time.sleep(0.05)
