"""How small the difference between two weight versions is, on the trajectory of a real optimiser.

A causal language model is trained with AdamW on its own samples of text, with float32 parameters, and each step is
published in bfloat16. Every published step is compared with the one before: the bytes of `weights.delta`, and of zstd
on the XOR of both, relative to the whole version; and the speed of both, on one core, per byte of the whole version.

    python -m sgpo_async.bench.delta MODEL [--lr 1e-6 1e-5 1e-4] [--steps 8] [--to FILE]

The first steps of AdamW move every weight by about the learning rate, later ones by less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from transformers import PreTrainedModel

from sgpo_async.bench.figures import as_json
from sgpo_async.files import write_whole
from sgpo_async.model.load import load_model
from sgpo_async.weights import delta
from sgpo_async.weights.writer import BUCKET_BYTES

SEQUENCES, LENGTH = 4, 64
ZSTD = pyarrow.Codec("zstd", compression_level=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m sgpo_async.bench.delta", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", help="folder or hub name of a causal language model")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4], help="learning rates")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps at each learning rate")
    parser.add_argument("--to", type=Path, help="file for the figures of every step, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        f"{'lr':>8} {'step':>4} {'changed':>8} {'delta':>7} {'zstd':>7} {'encode':>10} {'decode':>10} {'zstd':>10}",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for lr in args.lr:
        rows += [_row(lr, step, *pair) for step, pair in enumerate(_trajectory(args.model, lr, args.steps), 1)]
        for row in rows[-args.steps :]:
            print(_line(row), flush=True)
    if args.to:
        write_whole(args.to, as_json(rows))
    return 0


def _trajectory(path: str, lr: float, steps: int) -> Iterator[tuple[bytes, bytes]]:
    """The published bytes before and after each step."""
    model = load_model(path, device="cpu", dtype="float32")
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    before = _published(model)
    for _ in range(steps):
        ids = _sampled(model, generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        after = _published(model)
        yield before, after
        before = after


@torch.no_grad()
def _sampled(model: PreTrainedModel, generator: torch.Generator) -> torch.Tensor:
    """Text that the model writes itself, after one random token: [SEQUENCES, LENGTH]."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    first = torch.randint(model.config.vocab_size, (SEQUENCES, 1), generator=generator)
    options: dict[str, Any] = {"do_sample": True, "min_new_tokens": LENGTH - 1, "max_new_tokens": LENGTH - 1}
    generate: Any = model.generate
    return torch.as_tensor(generate(first, attention_mask=torch.ones_like(first), pad_token_id=0, **options))


def _published(model: PreTrainedModel) -> bytes:
    words = [p.detach().to(torch.bfloat16).view(torch.int16).flatten().numpy() for p in model.parameters()]
    return np.concatenate(words).tobytes()


def _row(lr: float, step: int, before: bytes, after: bytes) -> dict[str, Any]:
    """Sizes as shares of the whole version, speeds in GB/s of it, bucket by bucket."""
    sizes: dict[str, int] = {"delta": 0, "zstd": 0}
    seconds: dict[str, float] = {"encode": 0.0, "decode": 0.0, "zstd_encode": 0.0}
    for start in range(0, len(after), BUCKET_BYTES):
        old, new = (memoryview(data)[start : start + BUCKET_BYTES] for data in (before, after))
        with _timed(seconds, "encode"):
            encoded = delta.encode(old, new)
        if encoded is not None:
            with _timed(seconds, "decode"):
                decoded = delta.decode(old, encoded)
            assert decoded == new
        sizes["delta"] += len(new if encoded is None else encoded)
        with _timed(seconds, "zstd_encode"):
            packed = _zstd_of_xor(old, new)
        sizes["zstd"] += len(packed)
    changed = np.mean(np.frombuffer(before, np.uint16) != np.frombuffer(after, np.uint16))
    shares = {name: size / len(after) for name, size in sizes.items()}
    speeds = {name: len(after) / 1e9 / spent if spent else None for name, spent in seconds.items()}
    return {"lr": lr, "step": step, "changed": float(changed), "bytes": len(after)} | shares | speeds


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU time of this thread to `seconds`: other processes then matter less."""
    start = time.thread_time()
    yield
    seconds[name] += time.thread_time() - start


def _zstd_of_xor(old: memoryview, new: memoryview) -> bytes:
    xor = np.frombuffer(old, np.uint8) ^ np.frombuffer(new, np.uint8)
    return bytes(ZSTD.compress(xor.tobytes(), asbytes=True))


def _line(row: dict[str, Any]) -> str:
    speeds = (f"{row[name]:.2f} GB/s" if row[name] else "-" for name in ("encode", "decode", "zstd_encode"))
    shares = (f"{row[name]:.2%}" for name in ("changed", "delta", "zstd"))
    return "{:>8} {:>4} {:>8} {:>7} {:>7} {:>10} {:>10} {:>10}".format(f"{row['lr']:g}", row["step"], *shares, *speeds)


if __name__ == "__main__":
    sys.exit(main())
