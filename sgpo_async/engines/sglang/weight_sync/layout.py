"""Computes the checksums that a server must answer to /weights_checker, from tensors with Hugging Face names.

SGLang stores a model in its own layout: q, k and v in one parameter, gate and up in another, the vocabulary padded, and
each parameter split over the tensor parallel ranks. `expected_checksums` builds this layout by the rules of SGLang
0.5.23 (sglang/srt/models/{qwen2,qwen3,llama,mistral}.py, layers/linear.py, layers/vocab_parallel_embedding.py,
configs/update_config.py) and hashes it as the server does. Equal checksums prove that every element arrived.

Not supported, because their checksums differ: quantised and pipeline parallel servers, --rl-on-policy-target (norms in
float32), and bfloat16 on a CPU with AMX, where SGLang repacks its matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sgpo_async.engines.sglang.processes.api import ServerRefused
from sgpo_async.engines.sglang.weight_sync.tensor_hash import cpu_hash, cuda_hash
from sgpo_async.errors import EngineError, WeightsError
from sgpo_async.weights import digest

Device = Literal["cpu", "cuda"]
Checksums = dict[str, str]  # SGLang's name of a parameter -> 16 hexadecimal digits

HASHES = {"cpu": cpu_hash, "cuda": cuda_hash}
THREADS = 4  # that hash; each holds one parameter, a second time if it is fused from several tensors
VOCABULARY_MULTIPLE = 64
PIECES = 8
LAYER = re.compile(r"model\.layers\.\d+(?=\.)")
CPU_MLP_MULTIPLE = 32  # per rank; GPU servers do not pad the MLP


@dataclass(frozen=True, kw_only=True)
class Family:
    """The differences between the supported architectures."""

    qkv_bias: bool | None = None  # None: as attention_bias of the config says, and then o_proj has a bias too
    qk_norm: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}


@dataclass(frozen=True)
class Cut:
    """How one tensor is split over the ranks: padded with zeros from `size` to `padded` along `dim`, cut in `pieces`.

    With fewer pieces than ranks, neighbouring ranks share a piece. Without `dim`, every rank has the whole tensor.
    """

    source: str  # the Hugging Face name
    dim: int | None = None
    size: int = 0
    padded: int = 0
    pieces: int = 1

    def of(self, tensor: torch.Tensor, *, rank: int, tp: int) -> torch.Tensor:
        """The piece of `tensor` on `rank`. Raises WeightsError unless its size along `dim` is the model's."""
        if self.dim is None:
            return tensor
        if tensor.shape[self.dim] != self.size:
            raise WeightsError(
                f"parameter {self.source}: got shape {tuple(tensor.shape)}, but config.json says {self.size} "
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
    """The checksum of every parameter of a server with `tensors`: one dict per tensor parallel rank.

    Each tensor is looked up once, so a lazy mapping reads each tensor once; several threads look them up. `config` is
    the model's config.json, `dtype` the server's --dtype, `device` where it runs. Raises EngineError for a model that
    is not supported or that cannot be split over `tp` ranks, WeightsError if the tensors are not those of the model.
    """
    layout = layout_of(config, tp=tp, device=device)
    known = {cut.source for cuts in layout.values() for cut in cuts}
    unread = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing, unknown = known - tensors.keys(), tensors.keys() - known - unread
    if missing or unknown:
        raise WeightsError(
            f"the tensors are of another model: {_some(missing)} missing, {_some(unknown)} unknown to "
            f"{_architecture(config)}; use the same model.path for learner and engine"
        )

    def by_rank(cuts: Sequence[Cut]) -> list[str]:
        sources, hashes = [tensors[cut.source] for cut in cuts], []
        for rank in range(tp):
            held = [cut.of(source, rank=rank, tp=tp).to(dtype) for cut, source in zip(cuts, sources, strict=True)]
            hashes.append(HASHES[device](torch.cat(held) if len(held) > 1 else held[0]))
        return hashes

    # Both hashes leave Python's lock to other threads while they compute.
    with ThreadPoolExecutor(THREADS) as threads:
        hashes = list(threads.map(by_rank, layout.values()))
    return [{name: one[rank] for name, one in zip(layout, hashes, strict=True)} for rank in range(tp)]


def digest_and_checksums(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], **options: Any
) -> tuple[str, list[Checksums]]:
    """What the weight sender computes: the digest of its tensors, and the `expected_checksums` of a server."""
    return digest(tensors.items()), expected_checksums(tensors, config, **options)


def layout_of(config: Mapping[str, Any], *, tp: int, device: Device) -> dict[str, list[Cut]]:
    """SGLang's parameters by name. A parameter is the concatenation of its cuts' pieces along dimension 0."""
    family = FAMILIES.get(_architecture(config))
    if family is None:
        raise EngineError(
            f"SGLang's layout of {_architecture(config)} is not supported, so its weights cannot be verified; "
            f"supported: {', '.join(FAMILIES)}"
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
    """Raise WeightsError unless the `answered` checksums are the `expected` ones on every rank."""
    if len(expected) != len(answered):
        raise WeightsError(f"weights of SGLang: {len(answered)} ranks answered, expected {len(expected)}")
    for rank, (wanted, held) in enumerate(zip(expected, answered, strict=True)):
        different = {name for name in wanted.keys() & held.keys() if wanted[name] != held[name]}
        if wanted != held:
            raise WeightsError(
                f"weights of SGLang, rank {rank}: of {len(wanted)} parameters, {_some(different)} differ from what was "
                f"sent and {_some(wanted.keys() - held.keys())} are missing; "
                f"{_some(held.keys() - wanted.keys())} are unexpected"
            )


@dataclass(frozen=True)
class Piece:
    """A part of a server's parameters, whose checksums can be asked for by themselves."""

    expected: list[Checksums]  # by rank
    others: list[str]  # substrings of the names of all other parameters, and of no name in this part


def pieces_of(expected: Sequence[Checksums]) -> list[Piece]:
    """All parameters in at most PIECES parts, of whole layers and of parameters outside of the layers."""
    names = {name for checksums in expected for name in checksums}
    stems = sorted({f"{match[0]}." if (match := LAYER.match(name)) else name for name in names})
    size = -(-len(stems) // PIECES)
    return [
        Piece(
            [{name: one for name, one in checksums.items() if name.startswith(part)} for checksums in expected],
            [other for other in stems if other not in part],
        )
        for part in (tuple(stems[start : start + size]) for start in range(0, len(stems), size))
    ]


def answered_checksums(answer: Mapping[str, Any]) -> list[Checksums]:
    """The checksums in the answer of /weights_checker to {"action": "checksum"}, in the order of the ranks.

    Raises ServerRefused if the answer contains none.
    """
    if not answer.get("success") or not answer.get("ranks"):
        raise ServerRefused(f"SGLang's /weights_checker gave no checksums: {answer.get('message', answer)}")
    return [r["checksums"] for r in sorted(answer["ranks"], key=lambda r: r["parallelism_info"][0]["tp_rank"])]


def _attention(prefix: str, config: Mapping[str, Any], family: Family, tp: int, device: Device) -> dict[str, list[Cut]]:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    # With fewer key and value heads than ranks, a GPU server repeats them. A CPU server would add heads of zeros.
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
    """The number of names, and the first three of them."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
    return f"{len(ordered)} ({shown})" if ordered else "none"
