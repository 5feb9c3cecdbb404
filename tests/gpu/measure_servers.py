"""Measures SGLang servers on a GPU: `python tests/gpu/measure_servers.py OUT.json [--shape S] [--transport T ...]`.

Uses random weights in the shape of a real model. Measures the start, the generation rate, the pause of a weight update,
and the difference between the servers' log-probabilities and those of transformers (random weights give high-entropy
distributions). Writes one JSON file with versions, devices and date. `--device cpu --dtype float32 --shape tiny` runs
it on any machine.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_servers import PYTHON, Learner, Served, devices, request, save, visible
from shapes import SHAPES

from sgpo_async.engines import Generate, Generated
from sgpo_async.model.load import load_model

UPDATES = 5  # per transport; the first one creates the process group and is not counted
# torch.cuda.nccl.version() is not used: it is the version that torch was built with, not the one that it loads.
PACKAGES = ("torch", "transformers", "nvidia-nccl-cu13", "triton", "sglang", "sglang-kernel", "flashinfer-python")


def main(arguments: list[str]) -> None:
    """Measure, and write the JSON file; the last line of standard output is its path."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="of each sequence")
    parser.add_argument("--transport", nargs="+", default=["tensor"], help="tensor, distributed (needs tp + 1 GPUs)")
    options = parser.parse_args(arguments)
    needed = options.tp + ("distributed" in options.transport)
    if options.device == "cuda" and len(devices()) < needed:
        parser.error(f"number of GPUs must be >= {needed}, got {len(devices())}")
    measurements = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(measurements, indent=2) + "\n", encoding="utf-8")
    print(options.out)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one shape."""
    measurements: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "machine": machine(options.device),
        "versions": {"learner": versions_of(sys.executable), "server": versions_of(PYTHON)},
    }
    vocabulary = SHAPES[options.shape]["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="sgpo-measure-") as name, ExitStack() as stack:
        folder = Path(name, "model")
        tensors = save(options.shape, folder, dtype=options.dtype)
        measurements["bytes_of_weights"] = sum(tensor.nbytes for tensor in tensors.values())
        gpu, cuda = options.device == "cuda", "distributed" in options.transport and options.device == "cuda"
        if gpu:
            torch.cuda.init()  # before CUDA_VISIBLE_DEVICES is changed for the servers
        learner = stack.enter_context(closing(Learner(tensors, Path(name), cuda=cuda)))
        if gpu:
            stack.enter_context(visible(devices()[1:] if cuda else devices()))
        for transport in options.transport:
            logs = Path(name, transport)
            served = Served(
                folder, logs, device=options.device, dtype=options.dtype, slots=options.slots, tp=options.tp,
                transport=transport,
            )  # fmt: skip
            with closing(served):
                served.load(learner.publish(2 * UPDATES * options.transport.index(transport)))
                if "generation" not in measurements:
                    measurements["start_s"] = served.start_s
                    measurements["generation"] = generation(served, tokens=options.tokens, vocabulary=vocabulary)
                    measurements["mismatch"] = mismatch(served, folder, options.device, vocabulary=vocabulary)
                measurements[f"updates_{transport}"] = updates(
                    served, learner, transport, tokens=options.tokens, vocabulary=vocabulary
                )
    return measurements


def generation(served: Served, *, tokens: int, vocabulary: int) -> dict[str, float]:
    """Tokens per second with all slots in use, and with one stream; each after one round of warm-up."""
    rates = {}
    for name, count in (("all_slots", served.slots), ("one_stream", 1)):
        served.generate(count, tokens=min(tokens, 32), vocabulary=vocabulary)
        began = time.monotonic()
        served.generate(count, tokens=tokens, vocabulary=vocabulary)
        rates[f"{name}_tokens_per_s"] = count * tokens / (time.monotonic() - began)
    return rates


def updates(served: Served, learner: Learner, transport: str, *, tokens: int, vocabulary: int) -> dict[str, Any]:
    """The pauses of servers while `transport` loads new versions during generation."""
    over, before = threading.Event(), len(served.engine.updates)
    first = served.engine.version
    assert first is not None

    def load() -> None:
        numbers, missing = itertools.count(10**6), served.slots
        while not over.is_set():
            for number in itertools.islice(numbers, missing):
                served.engine.submit(request(number, tokens=tokens, vocabulary=vocabulary))
            missing = len(served.engine.step(0.05))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        for number in range(1, UPDATES + 1):
            served.load(learner.publish(first + number))
            time.sleep(1.0)
    finally:
        over.set()
        thread.join()
    made = served.engine.updates[before:]
    counted = [update for update in made[1:] if update.transport == transport]
    parts = {
        part: [getattr(update, part) for update in counted] for part in ("pause_s", "shut_s", "load_s", "verify_s")
    }
    medians = {f"{part}_median": statistics.median(values) for part, values in parts.items()}
    return {**medians, "pause_s_max": max(parts["pause_s"]), "counted": len(counted), "of": len(made) - 1}


def mismatch(served: Served, folder: Path, device: str, *, vocabulary: int) -> dict[str, dict[str, float]]:
    """|log pi - log mu| of sampled tokens in nats; pi from transformers in each precision, mu from the server."""
    requests, results = served.generate(16, tokens=128, vocabulary=vocabulary)
    measurements = {}
    for precision in ("bfloat16", "float32"):
        model = load_model(str(folder), device=device, dtype=precision)
        off = np.concatenate([np.abs(logprobs(model, r, results[r.id]) - results[r.id].logprobs) for r in requests])
        measurements[precision] = {"mean": float(off.mean()), "max": float(off.max()), "tokens": off.size}
        del model
    return measurements


@torch.no_grad()
def logprobs(model: Any, asked: Generate, result: Generated) -> np.ndarray:
    """log softmax(z) of the result's tokens, from one forward pass; softmax in float32."""
    ids = torch.from_numpy(np.concatenate([asked.prompt, result.tokens])).long().to(model.device)
    logits = model(ids[None, :-1], use_cache=False).logits[0, asked.prompt.size - 1 :].float()
    values: np.ndarray = logits.log_softmax(-1).gather(1, ids[asked.prompt.size :, None])[:, 0].cpu().numpy()
    return values


def machine(device: str) -> dict[str, Any]:
    """The processor or the GPUs of this machine."""
    if device == "cpu":
        return {"device": platform.processor() or platform.machine()}
    fields = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(fields, capture_output=True, text=True, timeout=60, check=True)
    return {"device": listed.stdout.strip().splitlines()}


def versions_of(python: str) -> dict[str, str]:
    """The versions of Python and of the installed PACKAGES in its environment."""
    code = (
        "import json, platform, sys\nfrom importlib.metadata import distributions\n"
        "found = {d.metadata['Name']: d.version for d in distributions()} | {'python': platform.python_version()}\n"
        "print(json.dumps({name: found[name] for name in ['python', *sys.argv[1:]] if name in found}))"
    )
    answer = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
