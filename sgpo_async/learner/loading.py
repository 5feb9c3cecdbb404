"""Load the model of the run as a sharded policy, and once more as the initial teacher.

    config.json ──▶ modules, parameters without memory ──▶ shard ──▶ each rank reads its rows of every parameter

A rank holds 1/ranks of the model, in the dtype in which it is kept, and one slice more while it reads. Models that
cannot be read in slices (see `model.slices`) are loaded whole on every rank, and then sharded.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from sgpo_async.config.schema import Run
from sgpo_async.learner.compiling import compile_layers, require_c_compiler, require_compiler
from sgpo_async.learner.lora import adapt, initial, initialise
from sgpo_async.learner.policy import Policy, check_model, decoder_layers, recompute, rows_on, shard
from sgpo_async.learner.process_group import any_rank
from sgpo_async.model.adapters import is_adapter
from sgpo_async.model.load import load_model
from sgpo_async.model.parameters import cast
from sgpo_async.model.slices import CannotSliceError, Slice, Slices, open_slices

log = logging.getLogger(__name__)


def load_policy(folder: str, run: Run, mesh: DeviceMesh) -> Policy:
    """Load the policy, check that it can be trained, and shard it. A collective of all ranks.

    What is trained is kept in float32, and the model of trained adapters in `model.dtype`.

    Raises DataError if the model is missing, broken, incomplete or not supported, ConfigError if it cannot be compiled
    or has no layers for the adapters of `learner.lora`.
    """
    if mesh.device_type == "cuda":
        require_c_compiler()
    if run.learner.compile:
        require_compiler(mesh.device_type)
    slices = _slices(folder)
    if slices is None:
        policy = _whole(folder)
        check_model(policy)
        return prepare(policy, run, mesh)
    checked = dict(_checked(slices, run, mesh).model.named_parameters())
    policy = prepare(Policy(slices.model), run, mesh)

    def local(name: str, parameter: DTensor) -> Tensor:
        if is_adapter(name):
            return _own_rows(initial(name, parameter.shape, seed=run.seed), parameter)
        return checked.pop(name).detach().to_local().to(parameter.dtype)

    _fill(policy, local)
    gc.collect()  # FSDP's modules refer to each other: the twin would stay in memory
    return policy


def prepare(policy: Policy, run: Run, mesh: DeviceMesh) -> Policy:
    """Add what the run's configuration asks for, and shard. Adapters of a policy with values get theirs."""
    learner = run.learner
    if learner.lora.rank:
        policy.lora = learner.lora
        adapt(policy.model, decoder_layers(policy.model), policy.lora, dtype=getattr(torch, run.model.dtype))
        initialise(policy.model, seed=run.seed)
    if learner.compile:
        compile_layers(policy)
    recompute(policy, learner.recompute, offload=learner.offload_activations)
    return shard(policy, mesh, precision=learner.precision, offload=learner.offload_weights)


def load_teacher(folder: str, run: Run, mesh: DeviceMesh) -> Policy:
    """Load and shard a second copy of the run's initial weights, in `algorithm.teacher_dtype` and without gradient.

    Raises DataError like `load_policy`.
    """
    slices = _slices(folder)
    policy = (Policy(slices.model) if slices else _whole(folder)).requires_grad_(False)
    cast(policy, getattr(torch, run.algorithm.teacher_dtype))
    if run.learner.compile:
        compile_layers(policy)
    shard(policy, mesh, precision=run.learner.precision, offload=run.learner.offload_weights)
    if slices:
        _read(policy, slices)
    return policy


def _slices(folder: str) -> Slices | None:
    """Open the model's files, or return None if a rank cannot read slices of them. A collective of all ranks."""
    disable_progress_bar()
    found = None
    try:
        found = open_slices(folder)
    except CannotSliceError as reason:
        log.info("model.path: each rank loads the whole model of %s before it is sharded: %s", folder, reason)
    return None if any_rank(found is None) else found


def _whole(folder: str) -> Policy:
    return Policy(load_model(folder, device="cpu", dtype="float32"))


def _checked(slices: Slices, run: Run, mesh: DeviceMesh) -> Policy:
    """Read the model into a twin of the policy that computes in float32, as `check_model` requires, and check it.

    The twin has the dtype in which the policy keeps the model, so that no more memory is needed than for the policy.
    """
    twin = Policy(copy.deepcopy(slices.model))
    if run.learner.lora.rank:
        cast(twin, getattr(torch, run.model.dtype))
    shard(twin, mesh, precision="float32", offload=run.learner.offload_weights)
    _read(twin, slices)
    check_model(twin)
    assert isinstance(twin, FSDPModule)
    twin.reshard()  # frees the embedding and the output matrix, which a root keeps gathered
    return twin


def _read(policy: Policy, slices: Slices) -> None:
    """Read this rank's rows of every parameter."""
    _fill(policy, lambda name, parameter: _own_rows(slices.parameters[name], parameter))


def _own_rows(part: Slice | Tensor, parameter: DTensor) -> Tensor:
    """Read this rank's rows of a parameter. torch rounds as `load_model` in float32 and then a cast would."""
    mesh = parameter.device_mesh
    rows = rows_on(len(parameter), mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))
    stored = part[rows.start : rows.stop]
    return torch.empty(stored.shape, dtype=parameter.dtype, device=mesh.device_type).copy_(stored)


def _fill(policy: Policy, local_of: Callable[[str, DTensor], Tensor]) -> None:
    """Replace the parameters of a sharded policy, which are on the meta device, by this rank's part of the values.

    Args:
        local_of: returns this part, from the name of the parameter in the model and the parameter.
    """
    for name, parameter in list(policy.model.named_parameters()):
        assert isinstance(parameter, DTensor)
        value = DTensor.from_local(
            local_of(name, parameter),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).to(policy.home)  # from_local has moved it to the device of the mesh
        # FSDP and all modules of a tied parameter keep the object.
        torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
