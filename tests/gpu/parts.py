"""The parts of `check.py`: `python tests/gpu/parts.py PART --device cuda|cpu --size full|tiny --to FILE`.

Each part is a function that measures on one device and records every measurement at once. If a measurement exceeds its
bound, the part records it and raises AssertionError.

    demo       configs/demo.yaml as a user runs it, with one rank and one actor: does the policy learn?
    mismatch   |log pi - log mu| between the learner and the embedded engine on the same weights
    losses     fused losses compared with losses from full logits, and with Liger's if it is installed
    step       one training step of models of real size: peak memory, tokens/s, MFU, the attention kernels
    weights    one version from the learner's parameters to the engine: gather, store, Torch RPC, load
    tests      the tests marked gpu that need one GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from shapes import SHAPES, random_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from sgpo_async.algorithm import DIVERGENCES, LogProbability, Part, TeacherDivergence, linear, linear_loss
from sgpo_async.config.schema import Algorithm, Learner, Local, Optim, Run
from sgpo_async.config.schema import Rollout as Sizes
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Weights
from sgpo_async.errors import SgpoError
from sgpo_async.learner import optimiser
from sgpo_async.learner.division import Piece, divide
from sgpo_async.learner.packing import Tokens, pack
from sgpo_async.learner.policy import Policy, check_model, recompute, shard
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.publish import Publisher
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.metrics import read_metrics, read_summary
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import load_model
from sgpo_async.session import SenderUp, VersionReceived, WeightReceiver, WeightSender
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest
from sgpo_async.wire.records import Rollout, Shard

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0  # timeout for another process; `check.py` limits the time of a part
LEARNED = 0.9  # required pass rate without strategies on held-out problems at the end of the demo
BFLOAT16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense FLOP/s of the SXM cards
MISMATCH_BOUND = {"float32": 1e-3, "bfloat16": 0.05}  # nats, mean over tokens


class Measurements:
    """The measurements of a part so far, in a JSON file that is always complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {}

    def record(self, name: str, value: Any) -> None:
        """Record one measurement, or a row of them."""
        self.found[name] = value
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=2), encoding="utf-8")
        draft.replace(self._path)


class Device:
    """The device under test: time and memory measurements."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cuda = name == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """The duration of `work`."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def reset_peak(self) -> None:
        """Reset the peak memory. On a CPU it cannot be reset and is that of the whole process."""
        gc.collect()  # modules that FSDP wrapped form reference cycles
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak_gb(self) -> float:
        """Peak memory, in 10^9 bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of bfloat16 matrix products; None for a device that is not listed."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        return next((flops for known, flops in BFLOAT16_FLOPS.items() if known in name), None)


def demo(device: Device, tiny: bool, measurements: Measurements) -> None:
    """The whole system, with the processes and commands of `launch/local.py`."""
    with tempfile.TemporaryDirectory(prefix="sgpo-gpu-demo-") as out:
        overrides = [f"out={out}", "name=demo", "local.ranks=1", "local.actors=1", f"engine.device={device.name}"]
        if tiny:
            overrides += ["steps=2", "learner.problems_per_step=2", "tasks.held_out=4", "rollout.max_new_tokens=24"]
        command = [sys.executable, "launch/local.py", "configs/demo.yaml", *overrides]
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT)
        folder = Path(out, "demo")
        while process.poll() is None:
            time.sleep(1.0)
            if (folder / "metrics.jsonl").exists() and (lines := read_metrics(folder)):
                evaluated = {line["step"]: line["eval_pass_auto"] for line in lines if "eval_pass_auto" in line}
                measurements.record("progress", {"step": lines[-1]["step"], "eval_pass_auto": evaluated})
        measurements.record("command_s", time.monotonic() - began)
        assert process.returncode == 0, f"the demo ended with code {process.returncode}"
        summary, lines = read_summary(folder), read_metrics(folder)
        kept = ("steps", "wall_s", "pass_auto_first", "pass_auto_last", "pass_guided_last", "lag_mean", "lag_max",
                "tokens_trained", "tokens_generated", "learner_idle", "engine_idle", "ledger", "mismatch")  # fmt: skip
        measurements.record("summary", {name: summary[name] for name in kept})
        measurements.record("ratio_by_lag_first_step", lines[0]["ratio_by_lag"])
        ledger = summary["ledger"]["rollouts"]
        assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values())
        assert tiny or summary["pass_auto_last"] >= LEARNED, (
            f"pass rate without strategies must be >= {LEARNED}, got {summary['pass_auto_last']}"
        )


def mismatch(device: Device, tiny: bool, measurements: Measurements) -> None:
    """The engine samples tokens and the learner's packed forward scores them: equal weights, different kernels."""
    mesh = join_alone(device.name)
    shapes = ["builtin:cues", "tiny" if tiny else "qwen2.5-0.5b"]
    count, tokens = (4, 12) if tiny else (64, 192)
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            model = _model(shape, device)
            weights = {name: p.detach().to(getattr(torch, dtype)) for name, p in model.named_parameters()}
            policy = shard(Policy(model), mesh, precision=dtype)
            results = _generated(_engine(shape, device, dtype, weights), count, tokens)
            off = np.concatenate([
                np.abs(own - result.logprobs) for own, (_, result) in
                zip(_token_logprobs(policy, results), results, strict=True)
            ])  # fmt: skip
            row = {"mean": float(off.mean()), "p99": float(np.quantile(off, 0.99)), "max": float(off.max()),
                   "tokens": off.size, "bound": MISMATCH_BOUND[dtype]}  # fmt: skip
            measurements.record(f"{shape} {dtype}", row)
            assert row["mean"] < row["bound"], row


def losses(device: Device, tiny: bool, measurements: Measurements) -> None:
    """Value, both gradients, seconds and peak memory of each implementation, forward and backward, in bfloat16."""
    rows, vocabulary, width = (32, 96, 16) if tiny else (8192, 151_936, 3584)
    torch.manual_seed(0)
    hidden, teacher = (torch.randn(rows, width, device=device.name).bfloat16() for _ in range(2))
    weight = (torch.randn(vocabulary, width, device=device.name) * width**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (rows,), device=device.name)
    measurements.record("size", {"T": rows, "V": vocabulary, "H": width})
    log_probability = Part(LogProbability(targets), lambda log_pi, _: -log_pi.mean())
    divergence = Part(TeacherDivergence(teacher, None, targets), lambda d, _: d.mean())
    implementations: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "logprobs": {
            "naive": lambda h, w: -(h @ w.T).float().log_softmax(-1).gather(1, targets[:, None]).mean(),
            "fused": lambda h, w: linear_loss(h, w, [log_probability])[0],
        },
        "forward_kl": {
            "naive": lambda h, w: DIVERGENCES["forward"].value(
                (teacher @ w.detach().T).float().log_softmax(-1), (h @ w.T).float().log_softmax(-1)
            ).mean(),
            "fused": lambda h, w: linear_loss(h, w, [divergence])[0],
        },
    }  # fmt: skip
    if device.cuda:  # elsewhere there are no kernels
        for by_name in implementations.values():
            by_name["fused, torch's operations"] = partial(_without_kernels, by_name["fused"])
    try:
        _add_liger(implementations, teacher, targets, device)
    except ImportError as error:
        measurements.record("liger", f"not measured: {error}")
    for loss, by_name in implementations.items():
        reference: dict[str, Tensor] = {}
        for name, function in by_name.items():
            row = _timed_loss(function, hidden, weight, device, reference)
            measurements.record(f"{loss} {name}", row)
            assert row["off"]["loss"] < 2e-3, row


def _add_liger(implementations: dict[str, Any], teacher: Tensor, targets: Tensor, device: Device) -> None:
    """Add Liger's implementations. Raises ImportError if it is not installed.

    Its kernels need a GPU, or TRITON_INTERPRET=1 for a test run on a CPU.
    """
    if not device.cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("Liger's kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    cross_entropy, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(jsd_beta=0.0)  # beta 0: forward KL
    implementations["logprobs"]["liger"] = lambda h, w: cross_entropy(w, h, targets)
    implementations["forward_kl"]["liger"] = lambda h, w: jsd(h, w, teacher, w.detach(), None)


def _without_kernels(function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute a fused loss by torch's operations alone."""
    with patch.object(linear, "_kernels", lambda *_: None):
        return function(hidden, weight)


def _timed_loss(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, device: Device,
    reference: dict[str, Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Median time of three runs after one warm-up; relative errors of value and gradients against the first function.

    The first call stores its value and gradients in `reference`.
    """
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def once() -> Tensor:
        h.grad = w.grad = None
        loss = function(h, w)
        loss.backward()
        return loss.detach()

    loss = once()
    assert h.grad is not None
    assert w.grad is not None
    found = {"loss": loss.float(), "hidden": h.grad.clone(), "weight": w.grad.clone()}
    for name, value in found.items():
        reference.setdefault(name, value)
    off = {name: float((value - reference[name]).norm() / reference[name].norm()) for name, value in found.items()}
    del found
    device.reset_peak()
    before = torch.cuda.memory_allocated() if device.cuda else 0
    seconds = statistics.median(device.seconds(once) for _ in range(3))
    return {"seconds": seconds, "extra_gb": device.peak_gb - before / 1e9, "loss": float(loss), "off": off}


def step(device: Device, tiny: bool, measurements: Measurements) -> None:
    """SGPO with teacher=self, on rows of W tokens: one sequence of W tokens, and packed ones of W/4."""
    mesh = join_alone(device.name)
    shapes = ["tiny"] if tiny else ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b-4-layers"]
    widths = [64, 128] if tiny else [2048, 8192, 17408]
    for shape in shapes:
        for width in widths:
            for recomputes in (False, True):
                name = f"{shape} W={width}{' recompute' if recomputes else ''}"
                try:
                    measurements.record(name, _step(shape, width, mesh, device, recomputes))
                except torch.OutOfMemoryError as error:
                    measurements.record(name, {"out_of_memory": str(error).partition(". GPU")[0]})
                device.reset_peak()


def _step(shape: str, width: int, mesh: DeviceMesh, device: Device, recomputes: bool) -> dict[str, Any]:
    run = Run(
        rollout=Sizes(autonomous=8, guided=4, max_new_tokens=width),
        algorithm=Algorithm(teacher="self"),
        optim=Optim(lr=1e-6),
        learner=Learner(problems_per_step=1, row_tokens=width, recompute=int(recomputes)),
        local=Local(ranks=1),
    )
    policy = Policy(random_model(shape, device=device.name))
    check_model(policy)
    recompute(policy, int(recomputes))
    shard(policy, mesh, precision="bfloat16")
    stepper = Stepper(run, policy, optimiser.build(policy, run.optim), Teacher(run.algorithm, None))
    batch = stepper.batch(_shard(width, vocabulary=SHAPES[shape]["vocab_size"]))
    stepper.train(batch, step=0)
    device.reset_peak()
    seconds = statistics.median(device.seconds(lambda: stepper.train(batch, step=1)) for _ in range(2))
    peak_gb = device.peak_gb
    students, teachers = batch.sequences.students, [item.teacher for item in batch.sequences.distillation]
    flops = sum(3 * _forward(stepper, own) for own in students) + sum(_forward(stepper, own) for own in teachers)
    trained = sum(tokens.length for tokens in students)
    return {
        "seconds": seconds,
        "peak_gb": peak_gb,
        "tokens": trained,
        "tokens_per_s": trained / seconds,
        "micro_batches": len(_micro_batches(students, width)),
        "tflops_per_s": flops / seconds / 1e12,
        "mfu": flops / seconds / device.peak_flops if device.peak_flops else None,  # without recomputation
        "attention": _attention(lambda: stepper.train(batch, step=2), device),
    }


def _forward(stepper: Stepper, own: Tokens) -> float:
    return stepper.cost.forward(length=own.length, targets=len(own.targets))


def _micro_batches(sequences: Sequence[Tokens], row_tokens: int) -> list[list[int]]:
    pieces = [Piece(tokens.length, tokens.length) for tokens in sequences]
    return [own for (own,) in divide(pieces, ranks=1, row_tokens=row_tokens)]


def _shard(width: int, *, vocabulary: int) -> Shard:
    """One problem: an autonomous rollout of W tokens and eleven rollouts of W/4 tokens; every second is correct."""
    rng = np.random.default_rng(0)
    prompt = width // 16
    rollouts = []
    for slot in range(12):
        length = (width if slot == 0 else width // 4) - prompt + 1
        guided = slot >= 8
        rollouts.append(
            Rollout(
                task=0, attempt=0, slot=slot, purpose="train", guided=guided,
                prompt=rng.integers(1, vocabulary, prompt * (2 if guided else 1)).astype(np.int32),
                tokens=rng.integers(1, vocabulary, length).astype(np.int32),
                logprobs=np.full(length, -np.log(vocabulary), np.float32),
                versions=np.array([0], np.int32),
                digests=np.zeros(1, np.int64), ends=np.array([length], np.int32),
                reward=float(slot % 2), finish="stop", unguided_logprob=-float(slot) if guided and slot % 2 else None,
            )
        )  # fmt: skip
    return Shard(step=0, version=0, problems=1, rollouts=tuple(rollouts))


def _attention(work: Callable[[], Any], device: Device) -> dict[str, int]:
    """The attention operators (on a GPU also the kernels) that `work` called, with the number of calls."""
    activities = [ProfilerActivity.CPU]
    if device.cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        work()
        device.wait()
    parts = ("attention", "attn", "fmha", "flash")  # substrings of the names of attention operators
    return {event.key: event.count for event in profiled.key_averages() if any(p in event.key.lower() for p in parts)}


def weights(device: Device, tiny: bool, measurements: Measurements) -> None:
    """Three versions travel from FSDP's shards through the store and a Torch RPC world of two into an engine."""
    shape, mesh = "tiny" if tiny else "qwen2.5-1.5b", join_alone(device.name)
    policy = shard(Policy(random_model(shape, device=device.name)), mesh, precision="bfloat16")
    engine = EmbeddedEngine(random_model(shape, dtype="bfloat16", device=device.name), digest=digest, slots=8)
    sent = sum(p.numel() * 2 for p in policy.parameters())
    measurements.record("bytes", sent)
    written: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="sgpo-gpu-weights-") as folder,
        closing(StoreFile(folder, expected_bytes=sent)) as file,
        Session(file) as session,
    ):
        store, note = StoreWriter(file.path), lambda *_: written.append(time.perf_counter())
        publisher = Publisher(policy, torch.bfloat16, store=store, published=note)
        for version in range(3):
            with torch.no_grad():
                next(policy.parameters()).add_(1e-2)
            began = time.perf_counter()
            waited = device.seconds(partial(publisher.publish, version))
            publisher.wait()
            event = session.wait(version)
            pulled = time.perf_counter()
            with closing(StoreReader(event.path)) as reader:
                read = partial(reader.tensors, version)
                loaded = device.seconds(partial(engine.load, Weights(version=version, digest=event.digest, read=read)))
            assert engine.version == version
            measurements.record(
                f"version {version}",
                {"learner_waits_s": waited, "in_store_s": written[-1] - began, "pull_s": event.seconds,
                 "at_the_node_s": pulled - began, "load_s": loaded, "gb_per_s_pull": sent / event.seconds / 1e9},
            )  # fmt: skip


class Session:
    """The weight sender of a store, and the weight receiver of one actor."""

    def __init__(self, store: StoreFile) -> None:
        self._sender = WeightSender(store.path, "checked", "127.0.0.1")
        self._local = StoreFile(tempfile.gettempdir())
        self._receiver = WeightReceiver("checked", store=self._local.path)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.stop()
        self._receiver.stop()
        self._local.close()

    def wait(self, version: int) -> VersionReceived:
        """Wait until the weight receiver has this version."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for event in self._sender.poll():
                assert isinstance(event, SenderUp), event
                self._receiver.connect("127.0.0.1", event.port, event.secret)
            for event in self._receiver.poll():
                if isinstance(event, VersionReceived) and event.version == version:
                    return event
            time.sleep(0.002)
        raise AssertionError(f"version {version} did not reach the weight receiver within {PATIENCE_S:g} s")


def tests(device: Device, tiny: bool, measurements: Measurements) -> None:
    """Run pytest -m gpu; on a CPU all tests are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not sglang", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    measurements.record("pytest", lines[-1] if lines else done.stderr[-2000:])
    if done.returncode:
        measurements.record("output", done.stdout[-4000:])
    assert done.returncode == 0, "tests fail"
    assert not device.cuda or " passed" in measurements.found["pytest"], "every test was skipped"


def _model(shape: str, device: Device) -> Any:
    if shape.startswith("builtin:"):
        return load_model(model_folder(shape), device=device.name, dtype="float32")
    return random_model(shape, device=device.name)


def _engine(shape: str, device: Device, dtype: str, weights: dict[str, Tensor]) -> EmbeddedEngine:
    model = _model(shape, device).to(getattr(torch, dtype))
    engine = EmbeddedEngine(model, digest=digest, slots=64, end_ids=())
    tensors = {name: tensor.cpu() for name, tensor in weights.items()}
    engine.load(Weights(version=0, digest=digest(tensors.items()), read=tensors.copy))
    return engine


def _generated(engine: EmbeddedEngine, count: int, tokens: int) -> list[tuple[np.ndarray, Generated]]:
    """Random prompts with the engine's completions."""
    prompts = [np.random.default_rng(i).integers(1, 30, 16 + i % 7).astype(np.int32) for i in range(count)]
    for i, prompt in enumerate(prompts):
        engine.submit(Generate(id=i, prompt=prompt, max_new_tokens=tokens, temperature=1.0, seed=i))
    results: dict[Any, Generated] = {}
    while len(results) < count:
        results |= {result.id: result for result in engine.step(0.0) if isinstance(result, Generated)}
    return [(prompt, results[i]) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def _token_logprobs(policy: Policy, results: list[tuple[np.ndarray, Generated]]) -> list[np.ndarray]:
    """log pi of each sampled token, from the packed forward that training uses."""
    sequences = [Tokens(prompt, result.tokens) for prompt, result in results]
    found: dict[int, np.ndarray] = {}
    for micro_batch in _micro_batches(sequences, 2048):
        packed = pack([sequences[i] for i in micro_batch])
        log_pi = policy.log_probabilities(packed, 1.0).float().cpu()
        parts = log_pi.split([len(sequences[i].completion) for i in micro_batch])
        found |= {i: part.numpy() for i, part in zip(micro_batch, parts, strict=True)}
    return [found[i] for i in range(len(sequences))]


PARTS = {"demo": demo, "mismatch": mismatch, "losses": losses, "step": step, "weights": weights, "tests": tests}


def main(arguments: list[str]) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--size", choices=("full", "tiny"), required=True)
    parser.add_argument("--to", type=Path, required=True, help="JSON file")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    PARTS[options.part](Device(options.device), options.size == "tiny", Measurements(options.to))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SgpoError as error:
        sys.exit(f"error: {error}")
