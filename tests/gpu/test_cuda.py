"""Engine and demo on a CUDA device: pytest -m gpu. Without a device the tests are skipped."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from sgpo_async.algorithm import LogProbability, Part
from sgpo_async.config.schema import Run, Tasks
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Weights
from sgpo_async.learner import attention, checkpoint, loading, optimiser, policy
from sgpo_async.learner.attention import Segments, packed_attention
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.packing import Tokens, pack
from sgpo_async.learner.policy import Policy, recompute, shard
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.publish import gather
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.metrics import read_metrics
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.weights import digest
from tests.reference import learner_cases as cases

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


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"recompute": 1, "offload_activations": True}, "float32"),
        ({"offload_weights": True}, "float32"),
        ({"offload_weights": True}, "bfloat16"),
        ({"compile": True}, "int8"),
    ],
)
def test_options_of_the_learner_change_no_step(
    options: dict[str, Any], state: Any, tmp_path: Path, cuda_rank: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, a checkpoint, and a third step of the learner and of one that has read the checkpoint."""
    monkeypatch.setattr(policy, "GROUP_BYTES", 0)  # one FSDP group per layer, as for large models
    cases.tiny_model(dtype=torch.float32, exact=False).save_pretrained(tmp_path / "model")
    run = cases.settings(row_tokens=20, teacher="ema")
    run = replace(run, learner=replace(run.learner, precision="float32"), optim=replace(run.optim, state=state))

    def learner(own: Run) -> Stepper:
        loaded = loading.load_policy(str(tmp_path / "model"), own.learner, cuda_rank)
        teacher = Teacher(own.algorithm, loading.load_teacher(str(tmp_path / "model"), own, cuda_rank))
        return Stepper(own, loaded, optimiser.build(loaded, own.optim), teacher)

    def weights(stepper: Stepper, steps: range) -> dict[str, torch.Tensor]:
        for number in steps:
            stepper.update(cases.shard_of(cases.groups(seed=number), problems=4, step=number))
        return dict(gather(stepper.policy, torch.float32))

    plain, own = learner(run), learner(replace(run, learner=replace(run.learner, **options)))
    for expected, (name, found) in zip(weights(plain, range(2)).values(), weights(own, range(2)).items(), strict=True):
        # A step is 1e-2; random numbers for rounding are others on a CPU than on a GPU.
        atol = 1e-5 if state == "float32" else 3e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    if own.run.learner.offload_weights:
        tensors = [p.to_local() for p in own.policy.parameters() if isinstance(p, DTensor)]
        moments = [value for held in own.optimiser.state.values() for value in held.values()]
        assert all(tensor.is_pinned() for tensor in tensors) and {value.device.type for value in moments} == {"cpu"}
    with CheckpointWriter(tmp_path, keep=1) as writer:
        parts = {"module": own.policy, "optimiser": own.optimiser, "teacher": own.teacher.moving}
        writer.save(step=2, saved=Saved({}, b""), **parts)
    again = learner(own.run)
    checkpoint.restore(
        tmp_path / "step-00000002", module=again.policy, optimiser=again.optimiser, teacher=again.teacher.moving
    )
    straight, resumed = weights(own, range(2, 3)), weights(again, range(2, 3))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_activations_in_host_memory_leave_room_on_the_gpu(cuda_rank: DeviceMesh) -> None:
    """The peak falls by the inputs of all layers but the one that is recomputed, and the gradient stays the same."""
    config = Qwen2Config(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    row = pack([Tokens(np.zeros(1, np.int32), np.zeros(16_384, np.int32))])
    peaks, gradients = [], []
    for offload in (False, True):
        torch.manual_seed(0)
        trained = Policy(Qwen2ForCausalLM(config))
        recompute(trained, 1, offload=offload)
        shard(trained, cuda_rank, precision="bfloat16")
        torch.cuda.reset_peak_memory_stats()
        measure = LogProbability(torch.from_numpy(row.targets).cuda())
        loss, _ = trained(row, [Part(measure, lambda values, _: values.sum())], 1.0)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append([p.grad.full_tensor() for p in trained.parameters() if isinstance(p.grad, DTensor)])
        del trained, loss
    assert peaks[0] - peaks[1] > 20 * 16_384 * 256 * 2
    for own, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-3)  # the kernel sums in any order


def test_the_demo_trains_with_nccl(tmp_path: Path) -> None:
    overrides = [f"out={tmp_path}", "name=cuda", "steps=6", "local.ranks=1", "local.actors=1", "evaluation.every=100"]
    command = [sys.executable, "-m", "sgpo_async.cli", "local", "configs/demo.yaml", *overrides]
    subprocess.run(command, check=True, timeout=500)
    summary = json.loads((tmp_path / "cuda" / "summary.json").read_text())
    assert summary["ledger"]["trained"] == 6 * 16
    first = read_metrics(tmp_path / "cuda")[0]
    assert first["ratio_by_lag"]["0"] == pytest.approx(1.0, abs=0.02)
