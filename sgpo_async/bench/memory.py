"""What a configuration needs of memory, without a GPU and without the weights: only the model's config.json.

The learner's part is not a formula: the learner's own policy, sharded as for the run, trains one full row on tensors
without memory (torch's FakeTensorMode), in a process group without peers, and torch's FSDPMemTracker adds up what is
alive at the peak. So it follows every change of the policy, its attention and its losses. Not included are the
teacher's hidden states of a step's other rows, and what learner.compile saves. Fake tensors are CPU tensors here: on
CUDA, the caches of its libraries come on top, which `RESERVED` stands for.

What learner.offload_activations and learner.offload_weights keep in host memory is counted as the memory of another
device, `HOST`, so that the peak is that of the GPU alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import _UpdateType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sgpo_async.algorithm import LogProbability, Part, TeacherDivergence, linear
from sgpo_async.config import Run
from sgpo_async.errors import DataError
from sgpo_async.learner import optimiser, policy
from sgpo_async.learner.loading import prepare
from sgpo_async.learner.packing import Packed, Tokens, pack
from sgpo_async.learner.policy import Policy
from sgpo_async.model.load import cache_bytes

RESERVED = 2 * 10**9  # of a GPU: CUDA's context, NCCL's buffers, workspaces and fragments of the allocator
PARTS = {  # of the tracker, in the words of the plan
    "Sharded Param": "weights",
    "OptState": "AdamW",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Unsharded Param": "gathered layers",
    "All Gather": "gathered layers",
    "Reduce Scatter": "gathered layers",
    "Activation": "activations",
    "Temp": "activations",
    "Inputs": "activations",
    "Buffer": "activations",
}

HOST = torch.device("meta")  # what the tracker takes for host memory, as it takes the CPU for the GPU
OFFLOADED = ("Sharded Param", "OptState", "Sharded Grad")  # kinds of the tracker, moved by learner.offload_weights


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one learner rank at the peak of a step, by part: on its GPU, and in host memory."""

    parts: Mapping[str, int]
    host: Mapping[str, int]  # of what learner.offload_activations and learner.offload_weights keep there

    @property
    def total(self) -> int:
        """All parts on the GPU together."""
        return sum(self.parts.values())


def learner_memory(run: Run, config: PreTrainedConfig, *, ranks: int, on_gpus: bool, prompt_tokens: int) -> RankMemory:
    """The memory of each of `ranks` ranks that train full rows, of completions of full length.

    A process group must not exist yet. Raises DataError if the model cannot be trained.

    Args:
        on_gpus: with the sizes and, if `learner.precision` is auto, the precision of a GPU.
        prompt_tokens: length of the prompts.
    """
    try:
        return _peak(run, config, ranks=ranks, on_gpus=on_gpus, prompt_tokens=prompt_tokens)
    except (TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"model.path: the learner's memory cannot be computed for this model: {reason}") from error


def _peak(run: Run, config: PreTrainedConfig, *, ranks: int, on_gpus: bool, prompt_tokens: int) -> RankMemory:
    """The peak of forward and backward, and the teacher's copy."""
    precision = run.learner.precision
    bfloat16 = precision == "bfloat16" or (precision == "auto" and on_gpus)
    sizes = linear.GPU_SIZES if on_gpus else linear.CPU_SIZES
    offloaded = run.learner.offload_weights
    with (
        _fake_world(ranks) as mesh,
        FakeTensorMode(),
        patch.object(linear, "CPU_SIZES", sizes),
        patch.object(policy, "save_on_cpu", _SavedOnHost),
    ):
        trained = _policy(config, run, mesh, bfloat16=bfloat16)
        teacher = _policy(config, run, mesh, bfloat16=bfloat16) if run.copies_teacher else None
        packed = full_row(run, prompt_tokens)
        adamw = optimiser.build(trained, run.optim)
        train_row(trained, teacher, packed, run)
        adamw.step()  # creates AdamW's state
        adamw.zero_grad()
        if isinstance(teacher, FSDPModule):
            teacher.reshard()  # what it gathers, and a root keeps, belongs to the peak
        tracker = _Tracker(trained, adamw, OFFLOADED if offloaded else ())
        tracker.track_inputs(())
        with tracker:
            train_row(trained, teacher, packed, run)
        peaks = tracker.get_tracker_snapshot("peak")
        parts, host = _parts(peaks[torch.device("cpu")]), _parts(peaks.get(HOST, {}))
        if teacher is not None:
            (host if offloaded else parts)["teacher"] = _copy_bytes(teacher, run, ranks)
        if run.copies_reference:
            (host if offloaded else parts)["reference"] = _copy_bytes(trained, run, ranks)
        if offloaded:
            parts["gathered layers"] += _on_the_way(trained)
    return RankMemory(parts, {name: nbytes for name, nbytes in host.items() if nbytes})


def _copy_bytes(policy: Policy, run: Run, ranks: int) -> int:
    """The size of a rank's part of a copy of these weights."""
    return policy.nbytes // 4 * getattr(torch, run.algorithm.teacher_dtype).itemsize // ranks


def _parts(snapshot: Mapping[Any, int]) -> dict[str, int]:
    """The bytes of the tracker's kinds on one device, by part of the plan."""
    parts: dict[str, int] = {}
    for name, nbytes in snapshot.items():
        if (kind := getattr(name, "value", name)) != "Total":
            parts[PARTS[kind]] = parts.get(PARTS[kind], 0) + int(nbytes)
    return parts


def _on_the_way(trained: Policy) -> int:
    """Bytes of a layer's shard that is copied to the GPU before it is gathered. The fake GPU is the CPU: no copy."""
    layers = [layer for layer in trained.modules() if isinstance(layer, FSDPModule) and layer is not trained]
    return max((sum(p.to_local().nbytes for p in _sharded(layer)) for layer in layers), default=0)


def _sharded(module: nn.Module) -> Iterator[DTensor]:
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        yield parameter


class _Tracker(FSDPMemTracker):
    """Counts tensors of the kinds `moved` as memory of `HOST`, wherever they are."""

    def __init__(self, module: nn.Module, adamw: torch.optim.Optimizer, moved: Collection[str]) -> None:
        super().__init__(module, adamw)
        self._moved = moved

    def _update_snap(
        self, u_type: Any, winfo: Any, old_mem_consumed: int | None = None, old_reftype: Any = None
    ) -> None:
        if winfo.reftype.value in self._moved and winfo.device != HOST:
            if u_type == _UpdateType.REF:  # it has just become one of these kinds
                kind, winfo.reftype = winfo.reftype, old_reftype
                super()._update_snap(_UpdateType.DEL, winfo)
                winfo.reftype, u_type = kind, _UpdateType.ADD
            winfo.device = HOST
        super()._update_snap(u_type, winfo, old_mem_consumed, old_reftype)


class _SavedOnHost(saved_tensors_hooks):
    """`save_on_cpu` for fake tensors, which are on the CPU already: keeps what is saved on `HOST`."""

    def __init__(self, *, pin_memory: bool) -> None:
        assert pin_memory
        super().__init__(lambda tensor: tensor.to(HOST), lambda saved: torch.empty_like(saved, device="cpu"))


def _policy(config: PreTrainedConfig, run: Run, mesh: DeviceMesh, *, bfloat16: bool) -> Policy:
    learner = replace(run.learner, precision="bfloat16" if bfloat16 else "float32", compile=False)
    made = Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    return prepare(made, replace(run, learner=learner), mesh)


def full_row(run: Run, prompt_tokens: int) -> Packed:
    """A micro-batch of completions of full length: as many as `learner.row_tokens` allows, or one."""
    completion = run.rollout.max_new_tokens
    count = max(1, run.learner.row_tokens // (prompt_tokens + completion - 1))
    rows = np.full((count, prompt_tokens + completion), np.arange(count)[:, None], np.int32)  # prompts differ
    return pack([Tokens(ids[:prompt_tokens], ids[prompt_tokens:]) for ids in rows])


def train_row(policy: Policy, teacher: Policy | None, packed: Packed, run: Run) -> None:
    """Forward and backward of one micro-batch: of distillation, which needs more memory, if the run has a teacher."""
    targets = torch.zeros(len(packed.targets), dtype=torch.long)
    measure: LogProbability | TeacherDivergence = LogProbability(targets)
    algorithm = run.algorithm
    if algorithm.compares_with_teacher and algorithm.teacher != "behaviour":
        with torch.no_grad():
            states = (teacher or policy).hidden(packed)
        measure = TeacherDivergence(states, None, targets, algorithm.divergence, clip=algorithm.kl_clip)
    loss, _ = policy(packed, [Part(measure, lambda values, _: values.sum())], run.rollout.temperature)
    loss.backward()


@contextmanager
def _fake_world(ranks: int) -> Iterator[DeviceMesh]:
    """A process group of `ranks` of which only this one exists; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class ServerMemory:
    """Bytes of one GPU of an inference server, and how many sequences it holds at once."""

    weights: int
    token: int  # keys and values of one token
    sequence_tokens: int  # prompt and completion at full length

    def full_sequences(self, gpu_bytes: float) -> int:
        """How many sequences of full length fit beside the weights."""
        return max(0, int((gpu_bytes - RESERVED - self.weights) / (self.token * self.sequence_tokens)))


def server_memory(run: Run, config: PreTrainedConfig, parameters: int, *, prompt_tokens: int) -> ServerMemory:
    """The memory of each GPU of a server with `engine.sglang.tp` GPUs, for a model of `parameters` parameters."""
    tp, dtype = run.engine.sglang.tp, getattr(torch, run.model.dtype)
    token = cache_bytes(config, dtype=dtype, tp=tp)
    return ServerMemory(parameters * dtype.itemsize // tp, token, prompt_tokens + run.rollout.max_new_tokens)
