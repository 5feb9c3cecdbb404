"""The process group of the ranks that torchrun starts: gloo on CPUs, gloo and NCCL on GPUs."""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

log = logging.getLogger(__name__)

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

# Newer versions of torch have this name, and warn at each call of the older name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""`all_gather_single(output, input)`: gather tensors of equal size into one tensor. A collective of all ranks."""


def join_world(*, timeout_s: float) -> DeviceMesh:
    """Join the process group of all ranks; return its one-dimensional mesh on this rank's device.

    Args:
        timeout_s: the timeout of every collective. It must be longer than a rank may wait for its batch, because the
            other ranks may already have theirs.
    """
    device = device_for(gpus=torch.cuda.device_count(), ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        # By default gloo listens on the address of the host name, which may not be an address of this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group(BACKENDS[device], timeout=timedelta(seconds=timeout_s))
    return init_device_mesh(device, (dist.get_world_size(),))


def join_alone(device: str = "cpu") -> DeviceMesh:
    """Create a process group of world size 1 on `device`, without torchrun or sockets, unless there is one already."""
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[device], store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,))


def _loopback() -> str:
    """Return the name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def device_for(*, gpus: int, ranks: int) -> str:
    """Return cuda if each rank of the node can have its own GPU, as NCCL requires; otherwise return cpu."""
    if 0 < gpus < ranks:
        log.warning("%d ranks use the CPU; start at most %d ranks to use the GPUs of this node", ranks, gpus)
    return "cuda" if gpus >= ranks else "cpu"
