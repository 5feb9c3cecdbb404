"""The plan of a run: its parts by hand, its peak against the same step on real tensors, what does not fit."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from sgpo_async.bench.memory import RESERVED, full_row, learner_memory, server_memory, train_row
from sgpo_async.bench.plan import GB, Hardware, plan, text
from sgpo_async.cli import machine
from sgpo_async.cli.main import main
from sgpo_async.config import Run, load
from sgpo_async.errors import CheckFailed, DataError
from sgpo_async.learner import optimiser
from sgpo_async.learner import policy as policy_module
from sgpo_async.learner.policy import Policy, shard
from sgpo_async.learner.process_group import join_alone

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Qwen2Config(
    vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)  # fmt: skip
PARAMETERS = 500 * 64 + 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 + 2 * 32 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run_of(*overrides: str) -> Run:
    return load(
        str(ROOT / "configs" / "demo.yaml"), ["learner.row_tokens=256", "rollout.max_new_tokens=50", *overrides]
    )


def test_weights_and_optimiser_are_divided_by_the_ranks() -> None:
    assert sum(p.numel() for p in Qwen2ForCausalLM(CONFIG).parameters()) == PARAMETERS
    found = {
        ranks: learner_memory(run_of(), CONFIG, ranks=ranks, on_gpus=True, prompt_tokens=10).parts for ranks in (1, 4)
    }
    for ranks, parts in found.items():
        assert parts["weights"] == pytest.approx(4 * PARAMETERS / ranks, rel=0.02)
        assert parts["AdamW"] == pytest.approx(8 * PARAMETERS / ranks, rel=0.02)
        assert parts["teacher"] == pytest.approx(4 * PARAMETERS / ranks, rel=0.02)
    assert found[1]["activations"] == pytest.approx(found[4]["activations"], rel=0.1)


def test_more_tokens_need_more_and_recomputation_needs_less() -> None:
    totals = [
        learner_memory(run_of(*words), CONFIG, ranks=2, on_gpus=True, prompt_tokens=10).parts["activations"]
        for words in ([], *(["learner.row_tokens=512", f"learner.recompute={every}"] for every in (0, 1, 2)))
    ]
    short, kept, recomputed, half = totals
    assert kept > 1.5 * short and recomputed < 0.7 * kept and recomputed < half < kept


def test_the_peak_is_that_of_the_same_step_on_real_tensors() -> None:
    run = run_of("algorithm.teacher=self")
    planned = learner_memory(run, CONFIG, ranks=1, on_gpus=False, prompt_tokens=10)
    policy = shard(Policy(Qwen2ForCausalLM(CONFIG)), join_alone(), precision="float32")
    row, adamw = full_row(run, 10), optimiser.build(policy, run.optim)
    train_row(policy, None, row, run)
    adamw.step()
    adamw.zero_grad()
    gc.collect()
    tracker = FSDPMemTracker(policy, adamw)
    tracker.track_inputs(())
    with tracker:
        train_row(policy, None, row, run)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert planned.total == pytest.approx(peak["Total"], rel=0.02)


@pytest.mark.parametrize(("state", "nbytes"), [("bfloat16", 4), ("int8", 2 + 8 / 64)])
def test_moments_in_fewer_bytes_count_as_such(state: str, nbytes: float) -> None:
    """Rows of 64 values are blocks of their own in int8, with two scales of 4 bytes."""
    parts = learner_memory(run_of(f"optim.state={state}"), CONFIG, ranks=2, on_gpus=True, prompt_tokens=10).parts
    assert parts["AdamW"] == pytest.approx(nbytes * PARAMETERS / 2, rel=0.02)


def test_with_adapters_the_model_is_kept_once_and_only_they_have_gradients_and_moments() -> None:
    run = run_of("learner.lora.rank=4", "model.dtype=bfloat16")
    adapters = 4 * 3 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128))
    parts = learner_memory(run, CONFIG, ranks=1, on_gpus=True, prompt_tokens=10).parts
    assert parts["weights"] == pytest.approx(2 * PARAMETERS + 4 * adapters, rel=0.02)
    assert parts["AdamW"] == pytest.approx(8 * adapters, rel=0.02)
    assert parts.get("gradients", 0) <= 1.02 * 4 * adapters and "teacher" not in parts


def test_what_waits_in_host_memory_is_not_counted_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "GROUP_BYTES", 0)  # one FSDP group per layer, as for large models
    plain, kept, offloaded = (
        learner_memory(run_of("learner.recompute=1", *words), CONFIG, ranks=2, on_gpus=True, prompt_tokens=10)
        for words in ([], ["learner.offload_activations=true"], ["learner.offload_weights=true"])
    )
    row = full_row(run_of(), 10).input_ids.size
    assert plain.host == {}
    assert kept.host == {"activations": 3 * row * 64 * 2}, "the inputs of three layers, in bfloat16"
    assert plain.total - kept.total == pytest.approx(kept.host["activations"], rel=0.01)
    shards = {"weights": 2, "gradients": 2, "AdamW": 4, "teacher": 2}  # bytes of a parameter, on two ranks
    assert offloaded.host == pytest.approx({name: size * PARAMETERS for name, size in shards.items()}, rel=0.02)
    on_gpu = sum(plain.parts[name] for name in ("weights", "AdamW", "teacher"))
    layer = (PARAMETERS - 500 * 64 - 64) // 3
    copied = offloaded.total - (plain.total - on_gpu)
    assert copied == pytest.approx(4 * layer / 2, rel=0.01), "a layer's shard, before it is gathered"


def test_a_servers_memory_by_hand() -> None:
    llama = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    run = replace(run_of(), model=replace(run_of().model, dtype="bfloat16"))
    found = server_memory(run, llama, 8_000_000_000, prompt_tokens=150)
    assert (found.weights, found.token, found.sequence_tokens) == (16 * 10**9, 2 * 32 * 8 * 128 * 2, 200)
    assert found.full_sequences(80 * GB) == (80 * GB - RESERVED - 16 * GB) // (131_072 * 200)
    assert found.full_sequences(10 * GB) == 0


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    CONFIG.save_pretrained(tmp_path)
    return [str(ROOT / "configs" / "paper-qwen2.5-7b.yaml"), f"model.path={tmp_path}", "learner.row_tokens=256"]


def test_the_command_says_what_does_not_fit(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *recipe, "rollout.max_new_tokens=200"]) == 0
    out, err = capsys.readouterr()
    assert not err and "learner, each of 4 ranks, full rows (learner.row_tokens=256)" in out and "GPU-hours" in out
    assert "host memory of each rank" not in out
    assert main(["plan", *recipe, "rollout.max_new_tokens=200", "learner.offload_weights=true"]) == 0
    assert "host memory of each rank, at its own peak\n  weights  " in capsys.readouterr().out
    small = f"--gpu-gb={RESERVED / GB + 0.0001}"
    assert main(["plan", *recipe, "rollout.max_new_tokens=200", small]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2
        and lines[0].startswith("does not fit: a learner rank needs ")
        and "a server's GPU has no room" in lines[1]
    )
    assert main(["plan", *recipe, "--train-tflops=0"]) == 2
    assert capsys.readouterr().err == "error: --train-tflops must be > 0, got 0.0\n"
    assert main(["plan", *recipe, "algorithm.objective=sft"]) in (0, 1)
    assert "no GPU-hours: algorithm.objective must be sgpo or grpo" in capsys.readouterr().out
    assert main(["plan", *recipe, "model.path=/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: model.path: ")


def test_the_doctor_compares_the_plan_with_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    run, facts = run_of("local.ranks=2"), SimpleNamespace(skeleton=SimpleNamespace(config=CONFIG))
    needed = RESERVED + learner_memory(run, CONFIG, ranks=2, on_gpus=True, prompt_tokens=150).total
    monkeypatch.setattr(machine, "device_for", lambda **_: "cuda")
    monkeypatch.setattr(machine, "parameters", lambda _: PARAMETERS)
    gpu = SimpleNamespace(total_memory=needed)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert "at the peak of a step with learner.row_tokens=256" in machine.training(run, facts)  # type: ignore[arg-type]
    gpu.total_memory = needed - 1
    with pytest.raises(
        CheckFailed, match=r"at the peak of a step with learner.row_tokens=256, and a GPU has .*; see sgpo-async plan"
    ):
        machine.training(run, facts)  # type: ignore[arg-type]


def test_the_rates_are_those_of_the_stated_hardware(recipe: list[str]) -> None:
    run = load(recipe[0], [*recipe[1:], "rollout.max_new_tokens=200", "engine.slots=8"])
    found = plan(run, Hardware(flops=1e12, bandwidth=1e9), completion_tokens=100, prompt_tokens=50)
    matrices = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    flops = 2 * matrices * 150 + 2 * 3 * 64 * 150**2 + 2 * 500 * 64 * 100
    assert found.train_tokens_per_s == pytest.approx(1e12 * 150 / (4 * flops)), "one forward is done twice"
    per_server, token = 2, 2 * 3 * 2 * 16 * 2
    seconds = (2 * PARAMETERS + per_server * 100 * token) / 1e9
    assert found.generate_tokens_per_s == pytest.approx(per_server / seconds)
    assert f"{found.generate_tokens_per_s:,.0f}" in text(found)


@pytest.mark.slow
def test_recipes_fit_their_gpus(tmp_path: Path) -> None:
    """Qwen2.5-7B on four GPUs of 80 GB for the learner and four for servers."""
    big = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    Qwen2Config(**big, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False).save_pretrained(
        tmp_path
    )
    run = load(str(ROOT / "configs" / "paper-qwen2.5-7b.yaml"), [f"model.path={tmp_path}"])
    with torch.device("cpu"):
        found = plan(run, Hardware(), completion_tokens=1000, prompt_tokens=150)
    assert not found.problems and (found.ranks, found.servers) == (4, 4)
    assert 35 * GB < found.learner.total < 50 * GB


def test_a_completion_longer_than_a_row_and_float32_count() -> None:
    words = (["rollout.max_new_tokens=400"], ["learner.row_tokens=409", "rollout.max_new_tokens=400"])
    one, same = (learner_memory(run_of(*own), CONFIG, ranks=2, on_gpus=True, prompt_tokens=10).total for own in words)
    assert one == same, "a row of 256 tokens has to hold a completion of 400"
    run = run_of("rollout.max_new_tokens=400", "learner.precision=float32")
    assert learner_memory(run, CONFIG, ranks=2, on_gpus=True, prompt_tokens=10).total > 1.2 * one


def test_a_model_that_cannot_be_trained_is_one_line() -> None:
    sizes = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = AutoConfig.for_model("gemma2", **sizes, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    with pytest.raises(
        DataError, match="the learner's memory cannot be computed for this model: its attention"
    ) as caught:
        learner_memory(run_of(), config, ranks=1, on_gpus=False, prompt_tokens=10)
    assert "\n" not in str(caught.value)
