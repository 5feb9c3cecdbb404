"""Random models in the shapes of real models; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

# From the config.json of Qwen2.5-0.5B-Instruct, 1.5B and 7B.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
    "tiny": dict(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.3,
    ),
}  # fmt: skip
# Four layers of the 7B model: weights, gradients and AdamW's state in float32 leave room on one GPU.
SHAPES["qwen2.5-7b-4-layers"] = SHAPES["qwen2.5-7b"] | {"num_hidden_layers": 4}


def config_of(shape: str, *, dtype: str) -> Qwen2Config:
    """The configuration of `shape`, without an end token."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2Config(**SHAPES[shape], rope_parameters=rope, bos_token_id=None, eos_token_id=None, dtype=dtype)


def random_model(shape: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A random model of `shape`, created on `device`."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config_of(shape, dtype=dtype), dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start as zeros and norms as ones, which would hide errors
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()
