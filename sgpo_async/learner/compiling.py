"""`learner.compile`: decoder layers compiled by torch.compile, one layer at a time.

A layer is compiled inside what `recompute` and `shard` put around it: its recomputation runs the compiled layer again,
and FSDP's gathers stay outside of it. The attention of packed rows is not compiled, because its loop over sequences
differs from row to row, so a layer becomes four graphs; all layers share them. Row lengths are symbols in these graphs.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from sgpo_async.config.schema import require
from sgpo_async.errors import ConfigError
from sgpo_async.learner.policy import Policy, decoder_layers

BACKEND = "inductor"  # of torch.compile


def require_compiler(device: str) -> None:
    """Raise ConfigError unless compiled layers can run here; `device` is "cpu" or "cuda"."""
    try:
        get_cpp_compiler()
        found = device == "cpu" or has_triton()
    except InvalidCxxCompiler:
        found = False
    needed = "a C++ compiler (apt install g++)" + " and the package triton" * (device != "cpu")
    require(found, "learner.compile", f"must be false on a machine without {needed}", True)


def compile_layers(policy: Policy) -> None:
    """Compile every decoder layer when it first runs, for rows of any length. Call this before `recompute`."""
    for layer in decoder_layers(policy.model):
        layer.forward = torch.compile(layer.forward, backend=BACKEND, dynamic=True)


def require_c_compiler() -> None:
    """Raise ConfigError unless there is a C compiler, with which triton builds what launches its kernels."""
    found = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not found:
        raise ConfigError("a learner on a GPU needs a C compiler for triton: apt install gcc python3-dev")
