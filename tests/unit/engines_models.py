"""Tiny random models for the tests of the engines, and reference values from their plain forward pass."""

import hashlib

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sgpo_async.engines import EmbeddedEngine, Generated, Scored, Weights

VOCABULARY = 32
MODELS = ("qwen2", "qwen3", "llama", "gpt2")
NO_END = ()


def tiny(kind, *, vocabulary=VOCABULARY, seed=0, spread=1.0, positions=256):
    """A random model of two layers, equal for equal arguments; `spread` scales its logits."""
    common = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    match kind:
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8, tie_word_embeddings=True))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**common))
        case "gpt2":
            config = GPT2Config(
                vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=positions, initializer_range=0.3,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(spread * (0.3 if kind != "gpt2" else 0.1))
    return model.eval()


def digest(named):
    """A stand-in for `sgpo_async.weights.digest`: any function of names, dtypes and bytes will do."""
    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def weights(model):
    """A copy of the parameters, as the learner publishes them."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def engine_of(model, *, slots=4, end_ids=NO_END, deterministic=False, version=0):
    """An engine that serves the weights of `model`."""
    engine = EmbeddedEngine(model, digest=digest, slots=slots, end_ids=end_ids, deterministic=deterministic)
    tensors = weights(model)
    engine.load(Weights(version=version, digest=digest(tensors.items()), read=tensors.copy))
    return engine


def drain(engine, requests=(), *, steps=10_000) -> dict:
    """Submit requests, step until all are finished, and return results by id."""
    for request in requests:
        engine.submit(request)
    results: dict[object, Generated | Scored] = {}
    for _ in range(steps):
        for result in engine.step(0.0):
            assert result.id not in results
            results[result.id] = result
        status = engine.load_status()
        if not status.running and not status.waiting:
            return results
    raise AssertionError(f"not done after {steps} steps: {engine.load_status()}")


def prompts_of(lengths, *, vocabulary=VOCABULARY, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def reference_logprobs(model, prompt, tokens, temperature):
    """log softmax(z/T) of `tokens` after `prompt`, one uncached forward in float64."""
    logprobs = reference_distributions(model, prompt, tokens, temperature)
    return logprobs[range(tokens.size), tokens]


@torch.no_grad()
def reference_distributions(model, prompt, tokens, temperature):
    """log softmax(z/T) over the vocabulary before each of `tokens`: [T, V]."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()
    logits = model(ids[None, :-1], use_cache=False).logits[0, prompt.size - 1 :].double()
    return torch.log_softmax(logits / temperature, -1).numpy()
