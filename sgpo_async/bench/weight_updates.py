"""The phases of weight updates of SGLang servers on a CPU that have requests in flight, for each transport.

    python -m sgpo_async.bench.weight_updates [MODEL] [--transport disk tensor] [--updates 6] [--to FILE]

Without a MODEL it takes random float32 weights in the shape of SmolLM2-135M. Every slot always has a request. A version
comes from a weight store, as in a run, and odd versions are scaled a little, so that their checksums differ. The next
one is loaded when all servers have the one before. Medians over servers and versions, in seconds:

    prepare    from `load` until the first server stops: read, check, encode or write, expected checksums
    shut       until the streams have ended
    load       SGLang's handling of the requests that load the version
    verify     until every checksum has been compared
    pause      how long the server got no requests
    outside    the pause without `load`
    stall      the longest time for which the loop that carries the streams did nothing else, of all updates

The first load is not counted, as it meets no requests.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sgpo_async.bench.figures import as_json
from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.base import Generate, Weights
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.errors import SgpoError
from sgpo_async.files import write_whole
from sgpo_async.model.load import load_model
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest

# From the config.json of SmolLM2-135M-Instruct, without its end token.
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
PROMPT, TOKENS = 32, 256  # of each request
TICK_S = 0.005
DEADLINE_S = 600.0
PHASES = ("prepare", "shut", "load", "verify", "pause", "outside")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m sgpo_async.bench.weight_updates", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", nargs="?", help="folder of a model; default: random weights in SmolLM2's shape")
    parser.add_argument("--python", default=".venv-sglang/bin/python", help="of SGLang's environment")
    parser.add_argument("--transport", nargs="+", default=["disk", "tensor"])
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8, help="of all servers together")
    parser.add_argument("--updates", type=int, default=6, help="versions after the first one")
    parser.add_argument("--to", type=Path, help="file for the figures of every update, as JSON")
    args = parser.parse_args(argv)
    columns = (*PHASES, "stall", "tokens/s")
    print(f"{'transport':>9} {'updates':>8} " + " ".join(f"{name:>8}" for name in columns), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or _random_model(Path(folder) / "model")
        for transport in args.transport:
            settings = Sglang(python=args.python, servers=args.servers, transport=transport)
            bench = Bench(model, Engine(kind="sglang", device="cpu", slots=args.slots, sglang=settings))
            rows.append(bench.measure(args.updates))
            numbers = [rows[-1]["median"][name] for name in PHASES] + [rows[-1]["stall"], rows[-1]["tokens_per_s"]]
            values = " ".join(f"{value:8.3f}" for value in numbers)
            print(f"{transport:>9} {len(rows[-1]['updates']):8} {values}", flush=True)
    if args.to:
        write_whole(args.to, as_json(rows))
    return 0


class Bench:
    """Servers whose slots always have requests, and a weight store."""

    def __init__(self, model: str, settings: Engine) -> None:
        self._engine = SglangEngine(model, settings, dtype="float32", digest=digest)
        self._slots, self._transport = settings.slots, settings.sglang.transport
        self._tensors = {
            name: one.detach() for name, one in load_model(model, device="cpu", dtype="float32").named_parameters()
        }
        self._vocabulary = self._tensors["model.embed_tokens.weight"].shape[0]
        self._file = StoreFile(tempfile.gettempdir())
        self._writer, self._reader = StoreWriter(self._file.path), StoreReader(self._file.path)
        self._ids, self._running = itertools.count(), 0
        self._stall = Stall()

    def measure(self, count: int) -> dict[str, Any]:
        """Load `count` versions after the first one; the timings of each update, their medians, the longest stall."""
        servers = len(self._engine.server_slots)
        self._engine.start()
        try:
            self._load(0, servers)
            self._serve(lambda: self._streamed() > 8 * self._slots, "the first tokens")
            assert self._engine._loop is not None
            self._stall.watch(self._engine._loop)
            began, tokens = time.monotonic(), self._engine.load_status().tokens
            prepared = {version: self._load(version, servers * (version + 1)) for version in range(1, count + 1)}
            rate = (self._engine.load_status().tokens - tokens) / (time.monotonic() - began)
            updates = [
                vars(update) | {"prepare_s": prepared[update.version], "outside_s": update.outside_s}
                for update in self._engine.updates[servers:]
            ]
        finally:
            self._stall.over.set()
            self._engine.close()
            self._file.close()
        median = {name: statistics.median(update[f"{name}_s"] for update in updates) for name in PHASES}
        found = {"transport": self._transport, "median": median, "stall": self._stall.longest, "tokens_per_s": rate}
        return found | {"updates": updates}

    def _load(self, version: int, updates: int) -> float:
        """Publish and load a version, wait until `updates` updates are done; how long the preparation took."""
        manifest = self._writer.publish(
            version, ((n, t * (1 + 1e-3 * (version % 2))) for n, t in self._tensors.items())
        )
        began = time.monotonic()
        self._engine.load(Weights(version=version, digest=manifest.digest, read=lambda: self._reader.tensors(version)))
        self._serve(lambda: len(self._engine.updates) == updates, f"version {version}", busy=version > 0)
        first = self._engine.updates[updates - len(self._engine.server_slots)]
        return first.began - began

    def _streamed(self) -> int:
        """How many tokens running completions have."""
        servers = [server_slot.server for server_slot in self._engine.server_slots]
        running = [one for server in servers if server is not None for one in list(server.running.values())]
        return sum(len(one.item.tokens) for one in running)

    def _serve(self, done: Any, event: str, *, busy: bool = True) -> None:
        """Keep every slot busy until `done()`."""
        deadline = time.monotonic() + DEADLINE_S
        rng = np.random.default_rng(0)
        while not done():
            if time.monotonic() > deadline:
                raise SgpoError(f"{event} did not come within {DEADLINE_S:g} s: {self._engine.events()}")
            while busy and self._running < 2 * self._slots:  # half of them wait for a slot
                prompt = rng.integers(0, self._vocabulary, PROMPT).astype(np.int32)
                id = next(self._ids)
                self._engine.submit(Generate(id=id, prompt=prompt, max_new_tokens=TOKENS, temperature=1.0, seed=id))
                self._running += 1
            self._running -= len(self._engine.step(0.01))


class Stall:
    """The longest time between two turns of a loop, beyond the sleep between them."""

    def __init__(self) -> None:
        self.longest, self.over = 0.0, threading.Event()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch `loop`, which another thread runs."""
        asyncio.run_coroutine_threadsafe(self._tick(), loop)

    async def _tick(self) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            await asyncio.sleep(TICK_S)
            self.longest = max(self.longest, time.monotonic() - began - TICK_S)


def _random_model(folder: Path) -> str:
    """Save random weights in SmolLM2's shape to `folder`."""
    torch.manual_seed(0)
    config: Mapping[str, Any] = SMOLLM2
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
