"""Rates from hardware and model: what one GPU does, and what the model needs for a token."""

from __future__ import annotations

from dataclasses import dataclass

from sgpo_async.simulation.rates import EngineRates, LearnerRates

GB = 10**9
RESERVED = 6 * GB  # of a server's GPU: CUDA, activations, graphs
OVERHEAD_S = 0.0015  # of a decoding step: launches, sampling, the scheduler
NETWORK = 10 * GB  # bytes per second from one node to another


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one GPU does."""

    memory: float = 80 * GB  # bytes
    flops: float = 0.4 * 989e12  # per second in training: 40 % of an H100's peak in bfloat16
    bandwidth: float = 0.5 * 3.35e12  # bytes per second in generation: half of an H100's


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model needs."""

    name: str
    parameters: float
    token_bytes: float  # keys and values of a token

    @property
    def nbytes(self) -> float:
        """Of the weights in bfloat16."""
        return 2 * self.parameters


# From the config.json of the models: layers x 2 x key-value heads x head dimension x 2 bytes.
QWEN_1_5B = Shape(name="Qwen2.5-1.5B", parameters=1.54e9, token_bytes=28 * 2 * 2 * 128 * 2)
QWEN_7B = Shape(name="Qwen2.5-7B", parameters=7.62e9, token_bytes=28 * 2 * 4 * 128 * 2)
LLAMA_8B = Shape(name="Llama-3.1-8B", parameters=8.03e9, token_bytes=32 * 2 * 8 * 128 * 2)
QWEN_32B = Shape(name="Qwen2.5-32B", parameters=32.8e9, token_bytes=64 * 2 * 8 * 128 * 2)
KNOWN = (QWEN_1_5B, QWEN_7B, QWEN_32B, LLAMA_8B)


def engine_rates(shape: Shape, gpu: Hardware, *, slots: int, tp: int = 1) -> EngineRates:
    """One server of `tp` GPUs; `slots` sequences at most."""
    room = tp * (gpu.memory - RESERVED) - shape.nbytes
    if room <= 0:
        raise ValueError(f"{shape.name} does not fit on {tp} GPUs of {gpu.memory / GB:g} GB")
    arithmetic = 2 * shape.parameters / (gpu.flops * tp)
    return EngineRates(
        slots=slots,
        base_s=shape.nbytes / (gpu.bandwidth * tp) + OVERHEAD_S,
        context_s=shape.token_bytes / (gpu.bandwidth * tp),
        compute_s=arithmetic,
        prefill_s=arithmetic,
        capacity=room / shape.token_bytes,
        load_s=0.1 + shape.nbytes / tp / (10 * GB),
    )


def learner_rates(shape: Shape, gpu: Hardware, *, ranks: int, recompute: bool = True) -> LearnerRates:
    """`ranks` GPUs under FSDP2. A trained token takes 6 FLOPs a parameter, and 2 more if it is computed again."""
    flops = (8 if recompute else 6) * shape.parameters
    return LearnerRates(
        ranks=ranks,
        token_s=flops / gpu.flops,
        step_s=0.5 + 16 * shape.parameters / ranks / (gpu.bandwidth / 2),
        publish_s=0.05 + shape.nbytes / ranks / (10 * GB),
        arrive_s=2 * shape.nbytes / NETWORK,
    )
