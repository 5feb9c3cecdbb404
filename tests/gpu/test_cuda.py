"""Engine and demo on a CUDA device: pytest -m gpu. Without a device the tests are skipped."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sgpo_async.config.schema import Tasks
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Weights
from sgpo_async.learner import attention
from sgpo_async.learner.attention import Segments, packed_attention
from sgpo_async.learner.process_group import join_alone
from sgpo_async.metrics import read_metrics
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.weights import digest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FOLDER = model_folder("builtin:cues")


@pytest.fixture(scope="module")
def cuda_rank() -> Iterator[DeviceMesh]:
    """The mesh of a process group of which this process is the only rank, on the GPU."""
    yield join_alone("cuda")
    dist.destroy_process_group()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_engines_logprobs_equal_those_of_the_model_on_the_cpu(dtype: str, tolerance: float) -> None:
    model = load_model(FOLDER, device="cpu", dtype="float32")
    tensors = {name: p.detach().to(getattr(torch, dtype)) for name, p in model.named_parameters()}
    engine = EmbeddedEngine.from_pretrained(FOLDER, digest=digest, slots=16, device="cuda", dtype=dtype)
    engine.load(Weights(version=0, digest=digest(tensors.items()), read=tensors.copy))
    tokenizer = load_tokenizer(FOLDER)
    prompts = {
        i: np.asarray(build_prompt(p.problem, p.strategy, tasks=Tasks(), tokenizer=tokenizer), np.int32)
        for i, p in enumerate(CuesSource(seed=0, held_out=32).held_out())
    }
    for i, prompt in prompts.items():
        engine.submit(Generate(id=i, prompt=prompt, max_new_tokens=40, temperature=1.0, seed=i))
    results: list[Generated] = []
    while len(results) < len(prompts):
        results += [result for result in engine.step(0.0) if isinstance(result, Generated)]
    for result in results:
        prompt = prompts[result.id]  # type: ignore[index]
        ids = torch.from_numpy(np.concatenate((prompt, result.tokens))).long()
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt), len(ids))
        expected = logprobs[at - 1, ids[at]].numpy()
        assert abs(result.logprobs - expected).max() < tolerance


@pytest.mark.parametrize("window", [None, 128, 4096])
@pytest.mark.parametrize("kv_heads", [2, 14])
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernel_for_packed_rows_equals_one_sequence_at_a_time(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kv_heads: int, width: int
) -> None:
    """Value and gradient of `varlen_attn` in bfloat16 against SDPA in float32."""
    torch.manual_seed(0)
    lengths = [1, 700, 33, 2000, 1362]
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    shapes = [(1, heads, sum(lengths), width) for heads in (14, kv_heads, kv_heads)]
    values = [torch.randn(shape, device="cuda") for shape in shapes]
    upstream = torch.randn(1, sum(lengths), 14, width, device="cuda")

    def mixed(dtype: torch.dtype) -> list[torch.Tensor]:
        own = [value.to(dtype, copy=True).requires_grad_() for value in values]
        segments = Segments(lengths, edges, set())
        found, _ = packed_attention(torch.nn.Module(), *own, None, sliding_window=window, segments=segments)
        found.backward(upstream.to(dtype))
        return [found.detach().float(), *(value.grad.float() for value in own if value.grad is not None)]

    kernel, calls = attention.varlen_attn, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return kernel(*args, **options)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    found, expected = mixed(torch.bfloat16), mixed(torch.float32)
    assert len(calls) == 1
    for own, other in zip(found, expected, strict=True):
        assert (own - other).norm() < 0.02 * other.norm()


def test_the_demo_trains_with_nccl(tmp_path: Path) -> None:
    overrides = [f"out={tmp_path}", "name=cuda", "steps=6", "local.ranks=1", "local.actors=1", "evaluation.every=100"]
    command = [sys.executable, "-m", "sgpo_async.cli", "local", "configs/demo.yaml", *overrides]
    subprocess.run(command, check=True, timeout=500)
    summary = json.loads((tmp_path / "cuda" / "summary.json").read_text())
    assert summary["ledger"]["trained"] == 6 * 16
    first = read_metrics(tmp_path / "cuda")[0]
    assert first["ratio_by_lag"]["0"] == pytest.approx(1.0, abs=0.02)
