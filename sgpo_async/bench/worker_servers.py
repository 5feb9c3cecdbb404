"""SGLang servers under load: `python -m sgpo_async.bench.worker_servers CONFIG SECONDS [key=value ...]`.

    bare       as many HTTP requests at a time as there are slots, nothing else
    actor      the actor's own loop on the same servers: leases in, judged rollouts out, over an in-memory hub
    updating   the same while a new version is published every second: what an update's pause is

Bare and actor take turns, three times, and have the same prompts and sampling. Evaluation leases, so that no score
of Eq. 4, which the bare generator does not make, is among the actor's requests.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import torch

from sgpo_async.actor.membership import Membership
from sgpo_async.actor.senders import Senders
from sgpo_async.actor.service import Service
from sgpo_async.config import Run, load
from sgpo_async.engines.base import Generate
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.engines.sglang.processes.api import http_session
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model
from sgpo_async.rollout.group import group_of
from sgpo_async.session import ReceiverEvent, VersionReceived, WeightSender
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.transport import Mailbox, RouterMailbox, memory_pair
from sgpo_async.weights import StoreFile, StoreWriter, digest
from sgpo_async.wire.records import Ack, Hello, Lease, Ready, Rollout, Welcome

TURNS = 3
WARM_S = 3.0  # of each turn, not counted
UPDATE_EVERY_S = 1.0


class Publications:
    """A weight store, and the events that a weight receiver would report about it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._file = StoreFile(tempfile.gettempdir())
        self._writer = StoreWriter(self._file.path)
        self._events: list[ReceiverEvent] = []
        self._version = -1

    @property
    def path(self) -> str:
        """The store."""
        return self._file.path

    def publish(self) -> None:
        """Publish the next version. Odd versions are scaled a little, so that checksums differ."""
        began = time.time()
        self._version += 1
        factor = 1.0 + 1e-3 * (self._version % 2)
        named = [(name, tensor * factor) for name, tensor in self._tensors.items()]
        manifest = self._writer.publish(self._version, named)
        self._events.append(
            VersionReceived(
                version=self._version,
                path=self._file.path,
                digest=manifest.digest,
                nbytes=manifest.nbytes,
                received=manifest.nbytes,
                seconds=time.time() - began,
                published_at=began,
            )
        )

    def connect(self, host: str, port: int) -> None:
        """There is no weight sender."""

    def stop(self) -> None:
        """There is no process."""

    def poll(self) -> list[ReceiverEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events


class MemoryHub:
    """Issues a lease for each one that is asked for, and counts the tokens of the rollouts."""

    def __init__(self, mailbox: RouterMailbox, leases: Iterator[Lease]) -> None:
        self.tokens = 0
        self._mailbox, self._leases = mailbox, leases
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._over.is_set():
            for member, message in self._mailbox.receive(0.05):
                if isinstance(message, Hello):
                    self._mailbox.send(member, Welcome())
                elif isinstance(message, Ready):
                    for _ in range(message.tasks):
                        self._mailbox.send(member, next(self._leases))
                elif isinstance(message, Rollout):
                    self.tokens += message.tokens.size
                    self._mailbox.send(member, Ack(task=message.task, attempt=message.attempt, slot=message.slot))


class Bench:
    """The servers, and what both kinds of load have in common."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = model_folder(run.model.path)
        self.tokenizer = load_tokenizer(self.folder)
        self._task_sampler = TaskSampler(run, source_of(run))
        self.engine = SglangEngine(self.folder, run.engine, dtype=run.model.dtype, digest=digest)
        self.engine.start()
        self.model = load_model(self.folder, device="cpu", dtype=run.model.dtype)

    def leases(self) -> Iterator[Lease]:
        """Leases of training problems, for evaluation."""
        for number in itertools.count():
            yield replace(self._task_sampler.task(number).lease(attempt=0, min_version=0), purpose="evaluate")

    def bodies(self) -> Iterator[dict[str, Any]]:
        """The bodies of SGLang requests for the same leases."""
        for lease in self.leases():
            group = group_of(lease, prompt=self._prompt)
            for request in group.requests():
                assert isinstance(request, Generate), "a new lease has no completions"
                sampling = {"temperature": request.temperature, "max_new_tokens": request.max_new_tokens}
                sampling |= {"top_p": request.top_p, "top_k": request.top_k or -1}
                yield {"input_ids": request.prompt.tolist(), "sampling_params": sampling, "return_logprob": True}

    def bare(self, seconds: float) -> float:
        """Tokens per second under plain HTTP requests."""
        return asyncio.run(self._bare(seconds))

    async def _bare(self, seconds: float) -> float:
        bodies = self.bodies()
        urls = [server_slot.url for server_slot in self.engine.server_slots]
        counted = 0
        start = time.monotonic() + WARM_S

        async def client(http: aiohttp.ClientSession, url: str) -> None:
            nonlocal counted
            while (now := time.monotonic()) < start + seconds:
                async with http.post(f"{url}/generate", json=next(bodies)) as response:
                    tokens = len((await response.json())["output_ids"])
                if now >= start and time.monotonic() < start + seconds:
                    counted += tokens

        async with http_session() as http:
            slots = -(-self.run.engine.slots // len(urls))
            await asyncio.gather(*(client(http, url) for url in urls for _ in range(slots)))
        return counted / seconds

    def actor(self, seconds: float, *, update_every_s: float | None = None) -> float:
        """Tokens per second under the actor's loop."""
        router, dealer = memory_pair()
        hub = MemoryHub(RouterMailbox(router), self.leases())
        publications = Publications(self.model)
        publications.publish()
        mailbox, hello = Mailbox(dealer), Hello(role="actor", name="bench")
        service = Service(
            mailbox=mailbox,
            membership=Membership(
                mailbox,
                hello,
                node=publications,  # type: ignore[arg-type]
                start_node=lambda: publications,  # type: ignore[arg-type, return-value]
                timeout_s=seconds,
            ),
            senders=Senders(lambda name, road: WeightSender(publications.path, name, "127.0.0.1", road=road)),
            engine=self.engine,
            tokenizer=self.tokenizer,
            run=self.run,
        )
        start, counted_from = time.monotonic() + WARM_S, None
        due = start

        def stopping() -> bool:
            nonlocal counted_from, due
            now = time.monotonic()
            if counted_from is None and now >= start:
                counted_from = hub.tokens
            if update_every_s is not None and now >= due:
                publications.publish()
                due += update_every_s
            return now >= start + seconds

        service.serve(stopping=stopping)
        hub.close()
        assert counted_from is not None
        return (hub.tokens - counted_from) / seconds

    def _prompt(self, problem: str, strategy: str | None) -> list[int]:
        return build_prompt(problem, strategy, tasks=self.run.tasks, tokenizer=self.tokenizer)


def main(config: str, seconds: str, *words: str) -> None:
    """Measure and print one line of JSON."""
    bench = Bench(load(config, words))
    try:
        turns = [(bench.bare(float(seconds)), bench.actor(float(seconds))) for _ in range(TURNS)]
        before = len(bench.engine.updates)
        updating = bench.actor(float(seconds), update_every_s=UPDATE_EVERY_S)
        updates = bench.engine.updates[
            before + len(bench.engine.server_slots) :
        ]  # the first of a session meets no load
    finally:
        bench.engine.close()
    pauses = sorted(update.pause_s for update in updates)
    bare, actor = (statistics.median(rates) for rates in zip(*turns, strict=True))
    figures = {
        "servers": len(bench.engine.server_slots),
        "bare_tokens_per_s": bare,
        "actor_tokens_per_s": actor,
        "actor_over_bare": statistics.median(actor / bare for bare, actor in turns),
        "turns": turns,
        "updating_tokens_per_s": updating,
        "updates": len(pauses),
        "pause_s_median": statistics.median(pauses),
        "pause_s_max": pauses[-1],
        "shut_s_median": statistics.median(update.shut_s for update in updates),
        "load_s_median": statistics.median(update.load_s for update in updates),
        "verify_s_median": statistics.median(update.verify_s for update in updates),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
