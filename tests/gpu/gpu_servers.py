"""SGLang servers with random weights in the shape of a real model, and a learner that publishes versions to them.

A GPU is not required: `tests/sglang/test_measure_rehearsal.py` uses this module on a CPU with the shape "tiny".
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import random_model

from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines import Generate, Generated, Weights
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.session import SenderUp, WeightReceiver, WeightSender
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("SGPO_SGLANG_PYTHON", str(ROOT / ".venv-sglang/bin/python"))
PATIENCE_S = 900.0  # timeout of steps that are not measured: the start of a server, a version of 15 GB


def save(shape: str, folder: Path, *, dtype: str) -> dict[str, torch.Tensor]:
    """Save a random model of `shape` without a tokenizer to a folder; returns its weights. It has no end token."""
    model = random_model(shape, dtype=dtype)
    model.save_pretrained(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def visible(names: Sequence[str]) -> Iterator[None]:
    """Processes started in this context see only these GPUs; this process keeps the GPUs of its CUDA context."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


class Learner:
    """A weight store with a weight sender and a weight receiver; the caller closes it.

    With `cuda` the weight sender uses the first visible GPU. No server may use this GPU, because NCCL refuses two ranks
    on one GPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path, *, cuda: bool) -> None:
        self._tensors = tensors
        self._file = StoreFile(folder, expected_bytes=sum(tensor.nbytes for tensor in tensors.values()))
        self._writer = StoreWriter(self._file.path)
        self._reader = StoreReader(self._file.path)
        self._local = StoreFile(folder)
        self._receiver = WeightReceiver("measured", store=self._local.path, pulls=False)
        self._sender = WeightSender(self._file.path, "measured", "127.0.0.1", cuda=cuda)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def tensors_of(self, version: int) -> dict[str, torch.Tensor]:
        """The tensors of a version. Odd versions are scaled by 1 + 2^-6, which changes nearly every bfloat16 value."""
        factor = 1 + 2**-6 * (version % 2)
        return {name: tensor * factor for name, tensor in self._tensors.items()}

    def publish(self, version: int) -> Weights:
        """Write a version to the store, from which it can be read or broadcast."""
        manifest = self._writer.publish(version, self.tensors_of(version).items())
        read = partial(self._reader.tensors, version)
        return Weights(version=version, digest=manifest.digest, read=read, groups=self._receiver.groups)

    def close(self) -> None:
        """Stop both processes."""
        self._over.set()
        self._thread.join()
        self._sender.stop()
        self._receiver.stop()
        self._reader.close()
        self._file.close()
        self._local.close()

    def _poll(self) -> None:
        while not self._over.wait(0.01):
            for event in self._sender.poll():
                if isinstance(event, SenderUp):
                    self._receiver.connect("127.0.0.1", event.port, event.secret)
            self._receiver.poll()


class Served:
    """A started engine; the caller closes it."""

    def __init__(self, folder: Path, logs: Path, *, device: str, dtype: str, slots: int, **sglang: Any) -> None:
        if device == "cuda":  # a transformers model shares the GPU with a server
            sglang["args"] = "--mem-fraction-static 0.6 " + sglang.get("args", "")
        settings = Sglang(**{"python": PYTHON, "phase_timeout_s": 300.0, "start_timeout_s": PATIENCE_S} | sglang)
        self.slots = slots
        engine = Engine(kind="sglang", device=device, slots=slots, sglang=settings)  # type: ignore[arg-type]
        self.engine = SglangEngine(str(folder), engine, dtype=dtype, digest=digest, logs=str(logs))
        began = time.monotonic()
        self.engine.start()
        self.start_s = time.monotonic() - began

    def close(self) -> None:
        """Stop the servers."""
        self.engine.close()

    def load(self, weights: Weights) -> None:
        """Load this version into all servers, which verify its checksums, and wait until all have it."""
        self.engine.load(weights)
        deadline = time.monotonic() + PATIENCE_S
        while not all(
            server_slot.server and server_slot.server.version == weights.version
            for server_slot in self.engine.server_slots
        ):
            assert time.monotonic() < deadline, f"version {weights.version} is not loaded: {self.engine.events()}"
            time.sleep(0.01)

    def generate(self, count: int, *, tokens: int, vocabulary: int) -> tuple[list[Generate], dict[Any, Generated]]:
        """`count` sequences of exactly `tokens` tokens at temperature 1, after random prompts."""
        requests = [request(index, tokens=tokens, vocabulary=vocabulary) for index in range(count)]
        for generate in requests:
            self.engine.submit(generate)
        results: dict[Any, Generated] = {}
        deadline = time.monotonic() + PATIENCE_S
        while len(results) < count:
            assert time.monotonic() < deadline, f"{len(results)} of {count} results: {self.engine.events()}"
            results |= {result.id: result for result in self.engine.step(0.05) if isinstance(result, Generated)}
        return requests, results


def request(number: int, *, tokens: int, vocabulary: int) -> Generate:
    """A request with a prompt of 32 random tokens, a different prompt for every number."""
    prompt = np.random.default_rng(number).integers(0, vocabulary, 32).astype(np.int32)
    return Generate(id=number, prompt=prompt, max_new_tokens=tokens, temperature=1.0, seed=number)
