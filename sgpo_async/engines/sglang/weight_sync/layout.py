"""What a server must answer to /weights_checker, from the tensors under their Hugging Face names.

SGLang holds a model in a layout of its own: q, k and v in one parameter, gate and up in another, the vocabulary padded,
each cut over the tensor parallel ranks. `expected_checksums` makes that layout by the rules of SGLang 0.5.23
(sglang/srt/models/{qwen2,qwen3,llama,mistral}.py, layers/linear.py, layers/vocab_parallel_embedding.py,
configs/update_config.py) and hashes it as the server does. Equal checksums prove that every element arrived.

Not covered, and so answered differently: quantised and pipeline parallel servers, --rl-on-policy-target (norms in
float32), and bfloat16 on a CPU with AMX, where SGLang repacks its matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sgpo_async.engines.sglang.weight_sync.tensor_hash import cpu_hash, cuda_hash
from sgpo_async.errors import EngineError, WeightsError

Device = Literal["cpu", "cuda"]
Checksums = dict[str, str]  # SGLang's name of a parameter -> 16 hexadecimal digits

HASHES = {"cpu": cpu_hash, "cuda": cuda_hash}
VOCABULARY_MULTIPLE = 64
CPU_MLP_MULTIPLE = 32  # on each rank; a GPU does not pad the MLP


@dataclass(frozen=True, kw_only=True)
class Family:
    """In what the decoders differ."""

    qkv_bias: bool | None = None  # None: if the model has an attention_bias, and then o_proj has one as well
    qk_norm: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}


@dataclass(frozen=True)
class Cut:
    """How the ranks share one tensor: padded with zeros from `size` to `padded` along `dim`, then cut in `pieces`.

    With fewer pieces than ranks, neighbours hold the same one. Without a `dim`, every rank holds the tensor.
    """

    source: str  # the Hugging Face name
    dim: int | None = None
    size: int = 0
    padded: int = 0
    pieces: int = 1

    def of(self, tensor: torch.Tensor, *, rank: int, tp: int) -> torch.Tensor:
        """What `rank` holds of `tensor`. Raises WeightsError unless its size along `dim` is the model's."""
        if self.dim is None:
            return tensor
        if tensor.shape[self.dim] != self.size:
            raise WeightsError(
                f"parameter {self.source}: shape {tuple(tensor.shape)} arrived, but config.json says {self.size} "
                f"along dimension {self.dim}"
            )
        length = self.padded // self.pieces
        start = min(rank * self.pieces // tp * length, self.size)
        piece = tensor.narrow(self.dim, start, min(length, self.size - start))
        zeros = list(piece.shape)
        zeros[self.dim] = length - piece.shape[self.dim]
        return torch.cat([piece, piece.new_zeros(zeros)], self.dim) if zeros[self.dim] else piece


def expected_checksums(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, tp: int, dtype: torch.dtype, device: Device
) -> list[Checksums]:
    """The checksum of every parameter of a server that holds `tensors`: one dict for each tensor parallel rank.

    Each tensor is asked for once, so they may be read as they are needed. `config` is the model's config.json, `dtype`
    the server's --dtype, `device` where it runs. Raises EngineError for a model that is not known here or that `tp`
    ranks cannot share, WeightsError if the tensors are not those of the model.
    """
    layout = layout_of(config, tp=tp, device=device)
    known = {cut.source for cuts in layout.values() for cut in cuts}
    unread = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing, unknown = known - tensors.keys(), tensors.keys() - known - unread
    if missing or unknown:
        raise WeightsError(
            f"tensors of another model: {_some(missing)} missing, {_some(unknown)} unknown to "
            f"{_architecture(config)}; learner and engine need the same model.path"
        )
    ranks: list[Checksums] = [{} for _ in range(tp)]
    for name, cuts in layout.items():
        sources = [tensors[cut.source] for cut in cuts]
        for rank, checksums in enumerate(ranks):
            held = [cut.of(source, rank=rank, tp=tp).to(dtype) for cut, source in zip(cuts, sources, strict=True)]
            checksums[name] = HASHES[device](torch.cat(held) if len(held) > 1 else held[0])
    return ranks


def layout_of(config: Mapping[str, Any], *, tp: int, device: Device) -> dict[str, list[Cut]]:
    """SGLang's parameters by name; each is its cuts' pieces one after another along dimension 0."""
    family = FAMILIES.get(_architecture(config))
    if family is None:
        raise EngineError(
            f"SGLang's layout of {_architecture(config)} is not known, so its weights cannot be verified; "
            f"known: {', '.join(FAMILIES)}"
        )
    vocabulary = _padded(config["vocab_size"], VOCABULARY_MULTIPLE)
    if vocabulary % tp:
        vocabulary = _padded(config["vocab_size"], VOCABULARY_MULTIPLE * tp)
    shared = {"model.embed_tokens.weight", "lm_head.weight"}
    if config.get("tie_word_embeddings"):
        shared.remove("lm_head.weight")
    layout = {name: [Cut(name, 0, config["vocab_size"], vocabulary, tp)] for name in sorted(shared)}
    layout["model.norm.weight"] = [Cut("model.norm.weight")]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            layout[prefix + norm] = [Cut(prefix + norm)]
        layout |= _attention(f"{prefix}self_attn.", config, family, tp, device)
        layout |= _mlp(f"{prefix}mlp.", config["intermediate_size"], tp, device)
    return layout


def compare(expected: Sequence[Checksums], answered: Sequence[Checksums]) -> None:
    """Raise WeightsError unless the server `answered` what was `expected`, rank by rank."""
    if len(expected) != len(answered):
        raise WeightsError(f"weights of SGLang: {len(answered)} ranks answered, there are {len(expected)}")
    for rank, (wanted, held) in enumerate(zip(expected, answered, strict=True)):
        different = {name for name in wanted.keys() & held.keys() if wanted[name] != held[name]}
        if wanted != held:
            raise WeightsError(
                f"weights of SGLang, rank {rank}: of {len(wanted)} parameters, {_some(different)} differ from what was "
                f"sent, {_some(wanted.keys() - held.keys())} missing; {_some(held.keys() - wanted.keys())} unexpected"
            )


def answered_checksums(answer: Mapping[str, Any]) -> list[Checksums]:
    """The checksums in what /weights_checker answers to {"action": "checksum"}, in the order of the ranks.

    Raises EngineError if the answer holds none.
    """
    if not answer.get("success") or not answer.get("ranks"):
        raise EngineError(f"SGLang's /weights_checker gave no checksums: {answer.get('message', answer)}")
    return [r["checksums"] for r in sorted(answer["ranks"], key=lambda r: r["parallelism_info"][0]["tp_rank"])]


def _attention(prefix: str, config: Mapping[str, Any], family: Family, tp: int, device: Device) -> dict[str, list[Cut]]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    # A GPU repeats key and value heads where there are fewer than ranks. A CPU would add heads of zeros.
    if heads % tp or (kv_heads % tp and (device == "cpu" or tp % kv_heads)):
        raise EngineError(
            f"engine.sglang.tp: {tp} ranks on a {device} cannot share {heads} attention heads with {kv_heads} key and "
            f"value heads; use a number that divides both"
        )
    queries, keys = heads * head_size, kv_heads * head_size
    bias = bool(config.get("attention_bias"))
    kinds = ["weight", "bias"] if (bias if family.qkv_bias is None else family.qkv_bias) else ["weight"]
    layout = {
        f"{prefix}qkv_proj.{kind}": [
            Cut(f"{prefix}q_proj.{kind}", 0, queries, queries, tp),
            Cut(f"{prefix}k_proj.{kind}", 0, keys, keys, min(tp, kv_heads)),
            Cut(f"{prefix}v_proj.{kind}", 0, keys, keys, min(tp, kv_heads)),
        ]
        for kind in kinds
    }
    layout[f"{prefix}o_proj.weight"] = [Cut(f"{prefix}o_proj.weight", 1, queries, queries, tp)]
    whole = ["q_norm.weight", "k_norm.weight"] if family.qk_norm else []
    if bias and family.qkv_bias is None:
        whole.append("o_proj.bias")
    return layout | {prefix + name: [Cut(prefix + name)] for name in whole}


def _mlp(prefix: str, size: int, tp: int, device: Device) -> dict[str, list[Cut]]:
    padded = _padded(size, CPU_MLP_MULTIPLE * tp) if device == "cpu" else size
    if padded % tp:
        raise EngineError(f"engine.sglang.tp: {tp} ranks cannot share intermediate_size {size}; use a divisor of it")
    gate, up = (Cut(f"{prefix}{name}_proj.weight", 0, size, padded, tp) for name in ("gate", "up"))
    return {
        f"{prefix}gate_up_proj.weight": [gate, up],
        f"{prefix}down_proj.weight": [Cut(f"{prefix}down_proj.weight", 1, size, padded, tp)],
    }


def _architecture(config: Mapping[str, Any]) -> str:
    return ", ".join(config.get("architectures") or ["a model without architectures in config.json"])


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _some(names: Iterable[str]) -> str:
    """How many, and which the first three are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
    return f"{len(ordered)} ({shown})" if ordered else "none"
