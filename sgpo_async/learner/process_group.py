"""The process group that torchrun prepared: gloo on CPUs, NCCL beside it where there are GPUs."""

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

# Newer torch has this name, and warns at each call of the older one.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather equal shares of all ranks into one tensor: `all_gather_single(output, input)`, a collective of all ranks."""


def join_world(*, timeout_s: float) -> DeviceMesh:
    """Join the group of all ranks; returns its one-dimensional mesh, on this rank's device.

    Args:
        timeout_s: of every collective: longer than a rank may wait for its batch while the others have theirs.
    """
    device = device_for(gpus=torch.cuda.device_count(), ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        # gloo would listen where this machine's own name leads, which may be elsewhere or nowhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group(BACKENDS[device], timeout=timedelta(seconds=timeout_s))
    return init_device_mesh(device, (dist.get_world_size(),))


def join_alone(device: str = "cpu") -> DeviceMesh:
    """Make this process a world of one on `device`, without torchrun and without a socket; again does nothing."""
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[device], store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,))


def _loopback() -> str:
    """Name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def device_for(*, gpus: int, ranks: int) -> str:
    """Cuda if each of a node's ranks can have a GPU of its own, which NCCL requires; else cpu, and says so."""
    if 0 < gpus < ranks:
        log.warning("%d ranks on the CPU; start at most %d for the GPUs of this node", ranks, gpus)
    return "cuda" if gpus >= ranks else "cpu"
