"""Packed attention equals each model's own attention on one sequence at a time, and no mask of a row exists."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sgpo_async.algorithm import LogProbability, Part
from sgpo_async.errors import DataError
from sgpo_async.learner import attention
from sgpo_async.learner.attention import Segments, packed_attention
from sgpo_async.learner.packing import Packed, Tokens, pack
from sgpo_async.learner.policy import Policy, check_model, recompute

SIZES = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 1.0},
    "gpt_neox": {"num_key_value_heads": 4},
    "mistral, window 5": {"sliding_window": 5},
    "qwen2, window 5": {"use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATING},
    "qwen3, window 1": {"use_sliding_window": True, "sliding_window": 1, "layer_types": ALTERNATING},
    "gemma3_text, window 5": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 4},
    "olmo3, window 5": {"sliding_window": 5, "layer_types": ALTERNATING},
}
LENGTHS = (1, 7, 2, 2, 23, 4, 5, 11, 7)


def model_of(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = name.partition(",")[0]
    config = AutoConfig.for_model(kind, **(SIZES | ARCHITECTURES[name] | more))
    return AutoModelForCausalLM.from_config(config).double().eval()


def sequences(lengths: tuple[int, ...]) -> list[Tokens]:
    """Sequences of these lengths in positions, each with a prompt of one or two tokens."""
    rng = np.random.default_rng(0)
    whole = [rng.integers(3, 13, length + 1).astype(np.int32) for length in lengths]
    return [Tokens(ids[: 1 + len(ids) // 3 % 2], ids[1 + len(ids) // 3 % 2 :]) for ids in whole]


def gradients(model: PreTrainedModel) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def coefficients(count: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, count, dtype=torch.float64)


def one_at_a_time(model: PreTrainedModel, items: list[Tokens]) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of all completions, by the model as transformers made it, and the gradient of their sum."""
    values = []
    for item in items:
        ids = torch.from_numpy(np.concatenate((item.prompt, item.completion))).long()
        log_probs = model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        values.append(log_probs[torch.arange(len(ids) - 1), ids[1:]][-len(item.completion) :])
    value = torch.cat(values)
    (value * coefficients(len(value))).sum().backward()
    return value.detach(), gradients(model)


def values_of(policy: Policy, packed: Packed) -> Tensor:
    """Log-probabilities of a row; the gradient of their sum is added to that of the parameters."""
    part = Part(LogProbability(torch.from_numpy(packed.targets)), lambda log_pi, _: (log_pi * weights).sum())
    weights = coefficients(len(packed.targets))
    loss, (found,) = policy(packed, [part], 1.0)
    loss.backward()
    return found.value


@pytest.mark.parametrize("recomputes", [0, 1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_row_equals_one_sequence_at_a_time(name: str, recomputes: int) -> None:
    items = sequences(LENGTHS)
    expected, expected_gradients = one_at_a_time(model_of(name), items)
    policy = Policy(model_of(name))
    check_model(policy)
    recompute(policy, recomputes)
    packed = pack(items)
    found = values_of(policy, packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    exact = 1e-5 if name.startswith("gemma") else 1e-9  # Gemma's norms compute in float32
    for own, other in zip(gradients(policy.model), expected_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=exact)


@pytest.mark.parametrize("recomputes", [0, 1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral, window 5", "qwen2, window 5"])
def test_prompts_that_are_computed_once_change_nothing(name: str, recomputes: int) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 13, length).astype(np.int32) for length in (9, 1, 4)]
    pieces = [(0, 3), (1, 5), (0, 1), (2, 8), (0, 12), (2, 2), (1, 4)]
    items = [Tokens(prompts[which], rng.integers(3, 13, length).astype(np.int32)) for which, length in pieces]
    expected, expected_gradients = one_at_a_time(model_of(name), items)
    policy = Policy(model_of(name))
    recompute(policy, recomputes)
    packed = pack(items)
    assert packed.shared is not None and packed.input_ids.shape == (1, sum(packed.lengths) - 2 * 9 - 1 - 4)
    found = values_of(policy, packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    exact = 1e-9 if name == "gpt_neox" else 1e-5  # the norms of the others compute in float32
    for own, other in zip(gradients(policy.model), expected_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=exact)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral, window 5", "gemma3_text, window 5"])
def test_no_mask_and_no_scores_of_a_row_are_allocated(name: str) -> None:
    width = 2000
    packed = pack(sequences((width // 2, width // 4, width // 4)))
    policy = Policy(model_of(name))
    with LargestTensor() as packed_way:
        policy.hidden(packed).sum().backward()
    assert packed_way.elements < (width // 4) ** 2  # not even those of the shortest sequence
    positions = torch.from_numpy(packed.position_ids)
    policy.model.set_attn_implementation("sdpa")
    with LargestTensor() as usual_way:
        policy.model.base_model(input_ids=torch.from_numpy(packed.input_ids), position_ids=positions, use_cache=False)
    assert usual_way.elements >= width**2


def by_definition(query: Tensor, key: Tensor, value: Tensor, edges: list[int], scale: float, window: int) -> Tensor:
    """Attention of each query over the `window` newest tokens of its sequence: [W, H, d], [W, h, d] to [W, H, d]."""
    result = torch.empty_like(query)
    share = query.shape[1] // key.shape[1]
    for begin, end in itertools.pairwise(edges):
        for at in range(begin, end):
            first = max(begin, at - window + 1)
            for head in range(query.shape[1]):
                scores = key[first : at + 1, head // share] @ query[at, head] * scale
                result[at, head] = scores.softmax(0) @ value[first : at + 1, head // share]
    return result


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A CPU stand-in for FlashAttention, with the interface that torch documents; yields its calls."""
    calls: list[dict[str, Any]] = []

    def varlen(  # noqa: PLR0917 (torch's signature)
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.tolist() == cu_k.tolist()
        assert max_q == max_k == cu_q.diff().max() and options["enable_gqa"] == (query.shape[1] != key.shape[1])
        left, right = options["window_size"]
        assert right == 0
        calls.append(options)
        window = left + 1 if left >= 0 else len(query)
        return by_definition(query, key, value, cu_q.tolist(), options["scale"], window)

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    yield calls


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_ways_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, kernel: list[dict[str, Any]], window: int | None, kv_heads: int
) -> None:
    torch.manual_seed(1)
    lengths = [1, 6, 6, 6, 13, 2, 2]
    edges = [0, 1, 7, 13, 19, 32, 34, 36]
    segments = Segments(lengths, torch.tensor(edges, dtype=torch.int32), set())
    query = torch.randn(1, 4, 36, 8, dtype=torch.float64)
    key, value = (torch.randn(1, kv_heads, 36, 8, dtype=torch.float64) for _ in range(2))
    of_token: Callable[[Tensor], Tensor] = lambda tensor: tensor[0].transpose(0, 1)  # noqa: E731
    expected = by_definition(of_token(query), of_token(key), of_token(value), edges, 0.3, window or 36)
    layer = torch.nn.Module()

    def computed() -> Tensor:
        mixed, _ = packed_attention(
            layer, query, key, value, None, scaling=0.3, sliding_window=window, segments=segments, dropout=0.0
        )
        return mixed[0]

    torch.testing.assert_close(computed(), expected)
    assert not kernel
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    torch.testing.assert_close(computed(), expected)
    assert len(kernel) == 1 and segments.windows == {window}


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "a mask of its own, or one of"),  # sinks
        ("gemma2", {"query_pre_attn_scalar": 4}, "a mask of its own, or one of"),  # softcap
        ("llama4_text", {"intermediate_size_mlp": 24, "num_local_experts": 2}, "cannot be trained on packed sequences"),
        ("bloom", {"n_head": 4}, "change when sequences are packed"),  # no attention of ours, but ALiBi
    ],
)
def test_an_attention_that_cannot_be_packed_is_refused(name: str, more: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(DataError, match=reason) as caught:
        check_model(Policy(model))
    assert "\n" not in str(caught.value)


def test_a_window_that_only_the_masks_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(*args: Any, sliding_window: int, **kwargs: Any) -> tuple[Tensor, None]:
        assert sliding_window == 5
        return packed_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", deaf)
    with pytest.raises(DataError, match="a sliding window that only its masks know"):
        check_model(Policy(model_of("mistral, window 5")))
