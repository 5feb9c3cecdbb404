"""An actor from start to end: find the hub, load the engine, serve one run after another.

    settings ─▶ engine (stays warm) ─▶ membership, service ─▶ the run is over
        ▲                                   │
        └────────── another run ◀───────────┘

The actor asks for the configuration before it joins: loading a model may take minutes, and the hub would consider a
member dead that is silent for so long. When the hub goes away, `service` continues, and `membership` tries to join
again for `hub_timeout_s`. A hub of another run ends the service, but the engine stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from sgpo_async.actor.membership import Membership, stop_node
from sgpo_async.actor.senders import Senders
from sgpo_async.actor.service import Service
from sgpo_async.config import Engine as EngineSettings
from sgpo_async.config import Model, Run, from_plain
from sgpo_async.config.rules import endpoint_of
from sgpo_async.engines.base import Engine
from sgpo_async.engines.open import open_engine
from sgpo_async.errors import SessionError
from sgpo_async.logs import fields
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint, version_bytes
from sgpo_async.session import Deadlines, WeightReceiver, WeightSender
from sgpo_async.session.interface import address_towards, interface_towards
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.transport import Dealer, Mailbox, request_settings
from sgpo_async.weights.store_file import StoreFile, machine
from sgpo_async.wire.records import Hello, Road

log = logging.getLogger(__name__)

MAX_BYTES = 2**30  # of one message, until the hub has told its own limit; ZeroMQ's limit of a frame stays 4 times this


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """What an inference node decides for itself; everything else comes from the hub."""

    hub: str
    name: str = field(default_factory=lambda: f"actor-{uuid.uuid4().hex[:6]}")  # unique among the run's members
    keys: str = ""
    model: str = ""  # a local copy, where the run's model.path does not resolve on this node
    slots: int = 0  # 0: as the run says
    servers: int = 0  # SGLang servers to launch, also where the run attaches to URLs; 0: as the run says
    tp: int = 0  # tensor parallel ranks of each server; 0: as the run says
    device: str = ""  # "": as the run says
    sglang_python: str = ""  # of SGLang's environment; "": as the run says
    sglang_urls: tuple[str, ...] = ()  # servers to attach to; none: as the run says
    logs: str = ""  # folder of the servers' logs; "": a temporary one
    own_store: bool = False  # share no weight store with other actors of this machine
    road: Road = "rpc"  # how it gets weights; by rpc it may serve other actors, too
    hub_timeout_s: float = 120.0  # how long to wait for the hub before giving up


class Actor:
    """One inference node.

    Raises HubError if no hub answers or it refuses the actor; EngineError or DataError if the model cannot be served.
    """

    def __init__(self, options: ActorOptions) -> None:
        self._options = options
        self._name = options.name
        self._stopped = False
        self._run_over = False
        self._warm_for: tuple[Model, EngineSettings] | None = None
        self._engine: Engine | None = None
        self._tokenizer: Any = None

    def run(self) -> int:
        """Serve until the run is over or a signal arrives; returns the exit status, 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            while not self._stopped and not self._run_over:
                keys, name = self._options.keys, self._name
                mailbox = Mailbox(Dealer(self._options.hub, keys=keys, name=name, max_bytes=MAX_BYTES))
                try:
                    self._run_over = self._serve(mailbox)
                finally:
                    mailbox.close(linger_s=1.0)  # the last releases and the goodbye are still to be sent
        finally:
            if self._engine is not None:
                self._engine.close()
        return 0

    def _serve(self, mailbox: Mailbox) -> bool:
        """Serve the run of this hub; returns whether it is over."""
        settings = request_settings(
            mailbox, name=self._name, timeout_s=self._options.hub_timeout_s, stopped=lambda: self._stopped
        )
        if settings is None:
            return True
        run = self._with_own_options(from_plain(settings))
        mailbox.dealer.max_bytes = run.hub.max_message_mb * 2**20  # as at the hub, which may be above MAX_BYTES
        about = fields(event="found", hub=self._options.hub, run=run.name, engine=run.engine.kind)
        log.info("hub %s, run %s", self._options.hub, run.name, extra=about)
        with contextlib.ExitStack() as stack:
            store = StoreFile(tempfile.gettempdir(), expected_bytes=version_bytes(run))
            stack.callback(store.close)
            node = self._start_node(run, store)  # now, because it imports torch while this process loads the engine
            with contextlib.ExitStack() as early:
                early.callback(stop_node, node)
                engine = self._warm(run)
                early.pop_all()
            membership = Membership(
                mailbox,
                self._hello(store),
                node=node,
                start_node=lambda: self._start_node(run, store),
                timeout_s=self._options.hub_timeout_s,
            )
            stack.callback(membership.close)
            senders = Senders(
                lambda name, road: WeightSender(store.path, name, address_towards(self._hub_host), road=road)
            )
            stack.callback(senders.close_all)
            service = Service(
                mailbox=mailbox,
                membership=membership,
                senders=senders,
                engine=engine,
                tokenizer=self._tokenizer,
                run=run,
            )
            reason = service.serve(stopping=lambda: self._stopped)
            log.info("leaves: %s", reason, extra=fields(event="left", reason=reason))
            return service.run_over

    def _hello(self, store: StoreFile) -> Hello:
        shares = not self._options.own_store
        return Hello(
            role="actor",
            name=self._name,
            tokenizer=tokenizer_fingerprint(self._tokenizer),
            machine=machine() if shares else "",
            store=store.path if shares else "",
            serves=self._options.road == "rpc",
            road=self._options.road,
        )

    def _start_node(self, run: Run, store: StoreFile) -> WeightReceiver:
        deadlines = Deadlines(group_s=run.engine.sglang.phase_timeout_s)
        pulls, deltas = not run.engine.broadcasts, run.hub.weight_deltas
        road = self._options.road
        try:
            return WeightReceiver(
                self._name, store=store.path, road=road, pulls=pulls, deltas=deltas, deadlines=deadlines
            )
        except OSError as error:
            raise SessionError(
                f"{self._name}: cannot start a weight receiver: {error}; free memory, or raise the limit of processes "
                "(ulimit -u)"
            ) from error

    @property
    def _hub_host(self) -> str:
        endpoint = endpoint_of(self._options.hub)
        assert endpoint, self._options.hub
        return endpoint[0]

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
        build_prompt("?", None, tasks=run.tasks, tokenizer=self._tokenizer)  # fail early
        self._engine = self._open_engine(folder, run)
        self._warm_for = run.model, run.engine
        seconds = round(time.monotonic() - began, 1)
        values = fields(event="engine", seconds=seconds)
        log.info("engine ready after %.1f s", seconds, extra=values)
        return self._engine

    def _open_engine(self, folder: str, run: Run) -> Engine:
        if run.engine.broadcasts:  # servers inherit the name of the interface towards the learner
            for backend in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface_towards(self._hub_host))
        return open_engine(run, folder, logs=self._options.logs, name=self._name, stopping=lambda: self._stopped)

    def _stop(self, *_: object) -> None:
        self._stopped = True
