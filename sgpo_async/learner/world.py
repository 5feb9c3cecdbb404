"""The process group that torchrun prepared: gloo on CPUs, NCCL beside it where there are GPUs."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def join_world(*, timeout_s: float) -> DeviceMesh:
    """Join the group of all ranks; returns its one-dimensional mesh, on this rank's device.

    Args:
        timeout_s: of every collective: longer than a rank may wait for its batch while the others have theirs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    return init_device_mesh(device, (dist.get_world_size(),))
