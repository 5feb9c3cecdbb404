"""What a configuration needs, before anything starts: memory by part, tokens per second, GPU-hours, what does not fit.

    config.json ─▶ memory of a learner rank, of a server, of the hub's machine
                └▶ FLOPs and bytes per token ─ stated rates ─▶ tokens per second ─▶ `cost`: hours and GPU-hours

Training is taken to be limited by arithmetic, and generation by reading weights, keys and values: the GPUs of a server
read the weights once, and the keys and values of all sequences, for one token of each sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sgpo_async.bench.cost import Assumptions, estimate, table
from sgpo_async.bench.memory import (
    RESERVED,
    RankMemory,
    ServerMemory,
    learner_memory,
    server_memory,
)
from sgpo_async.config import Run
from sgpo_async.errors import ConfigError
from sgpo_async.learner.division import Cost
from sgpo_async.learner.lora import adapter_parameters
from sgpo_async.learner.policy import decoder_layers
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import on_meta_device, read_config
from sgpo_async.simulation.hardware import GB, Hardware


@dataclass(frozen=True)
class Plan:
    """The needs of one run."""

    run: Run
    ranks: int
    servers: int  # GPUs of all servers
    learner: RankMemory
    server: ServerMemory | None  # None: the embedded engine
    store_bytes: int  # two versions of the weights, on the machine of hub and rank 0
    train_tokens_per_s: float  # of one GPU, forward and backward
    generate_tokens_per_s: float  # of one GPU
    hardware: Hardware
    given: Assumptions

    @property
    def problems(self) -> list[str]:
        """What does not fit, with the remedy."""
        found = []
        needed = self.learner.total + RESERVED
        if needed > self.hardware.memory:
            found.append(
                f"a learner rank needs {needed / GB:.1f} GB of {self.hardware.memory / GB:g}: "
                "use more ranks, learner.recompute=1, learner.offload_weights=true, or a smaller learner.row_tokens"
            )
        if self.server:
            fitting, slots = self.server.full_sequences(self.hardware.memory), self.slots
            if fitting == 0:
                found.append("a server's GPU has no room for a sequence beside the weights: raise engine.sglang.tp")
            elif fitting < slots:
                found.append(
                    f"a server holds {fitting} sequences of full length, not {slots}: engine.slots="
                    f"{fitting * max(self.run.engine.sglang.servers, 1)}, or expect retractions when all are long"
                )
        return found

    @property
    def slots(self) -> int:
        """The sequences of one server."""
        return self.run.engine.slots // max(self.run.engine.sglang.servers, 1)


def plan(run: Run, hardware: Hardware, *, completion_tokens: float, prompt_tokens: int) -> Plan:
    """Compute the plan of a run. Raises DataError if the model's config.json cannot be read.

    Args:
        completion_tokens: mean length of the completions, for time; memory is that of full length.
        prompt_tokens: length of the prompts.
    """
    config = read_config(model_folder(run.model.path))
    model = on_meta_device(config)
    parameters, cost = sum(p.numel() for p in model.parameters()), Cost.of(model)
    servers = run.local.actors * (run.engine.sglang.servers * run.engine.sglang.tp)
    on_gpus = run.engine.device != "cpu"
    server = (
        server_memory(run, config, parameters, prompt_tokens=prompt_tokens) if run.engine.kind == "sglang" else None
    )
    length = prompt_tokens + round(completion_tokens)
    forward = cost.forward(length=length, targets=round(completion_tokens))
    again = 1 / run.learner.recompute if run.learner.recompute else 0  # forward passes in the backward pass
    backward = 1 if run.learner.lora.rank else 2  # in forward passes; the model's own matrices get no gradient
    train = hardware.flops * length / ((1 + backward + again) * forward)
    generate = _generation(run, server, hardware, prompt_tokens + completion_tokens / 2) if server else train
    return Plan(
        run,
        run.local.ranks,
        servers,
        learner_memory(run, config, ranks=run.local.ranks, on_gpus=on_gpus, prompt_tokens=prompt_tokens),
        server,
        2 * published_bytes(run, model),
        train,
        generate,
        hardware,
        Assumptions(
            generate_tokens_per_s=generate,
            train_tokens_per_s=train,
            completion_tokens=completion_tokens,
            prompt_tokens=prompt_tokens,
        ),
    )


def published_bytes(run: Run, model: PreTrainedModel) -> int:
    """Size of what the learner publishes: the weights in `model.dtype`, or the adapters in float32."""
    if run.learner.lora.rank:
        return 4 * adapter_parameters(decoder_layers(model), run.learner.lora)
    return sum(p.numel() for p in model.parameters()) * getattr(torch, run.model.dtype).itemsize


def _generation(run: Run, server: ServerMemory, hardware: Hardware, context: float) -> float:
    """Tokens per second of one GPU of a server whose slots are all taken by sequences of `context` tokens."""
    sglang = run.engine.sglang
    sequences = run.engine.slots / max(sglang.servers, 1)
    seconds = (server.weights + sequences * context * server.token) / hardware.bandwidth
    return sequences / seconds / sglang.tp


def _table(parts: Mapping[str, int], limit: str = "") -> list[str]:
    rows = {**parts, "all": sum(parts.values())}
    return [f"  {name:22}{nbytes / GB:8.2f} GB{limit if name == 'all' else ''}" for name, nbytes in rows.items()]


def text(found: Plan) -> str:
    """The plan as lines of text."""
    lines = [f"learner, each of {found.ranks} ranks, full rows (learner.row_tokens={found.run.learner.row_tokens})"]
    parts = {**found.learner.parts, "CUDA, NCCL (assumed)": RESERVED}
    lines += _table(parts, f" of {found.hardware.memory / GB:g}")
    if found.learner.host:
        lines += ["host memory of each rank, at its own peak", *_table(found.learner.host)]
    if server := found.server:
        fitting = server.full_sequences(found.hardware.memory)
        lines += [
            f"server, each of {found.servers} GPUs",
            f"  {'weights':22}{server.weights / GB:8.2f} GB",
            f"  {'keys and values':22}{server.token / 1e3:8.0f} KB a token",
            f"  {'sequences':22}{fitting:8} of {server.sequence_tokens:,} tokens fit; it has {found.slots} slots",
        ]
    what = "adapters" if found.run.learner.lora.rank else "weights"
    lines.append(f"hub's machine: two versions of the {what}, {found.store_bytes / GB:.2f} GB of host memory")
    if server:
        rates = f"training {found.train_tokens_per_s:,.0f}, generation {found.generate_tokens_per_s:,.0f}"
        lines.append(f"tokens per second of one GPU: {rates} (from the stated rates)")
        try:
            lines += ["", table(estimate(found.run, found.given))]
        except ConfigError as error:
            lines.append(f"no GPU-hours: {error}")
    return "\n".join(lines)
