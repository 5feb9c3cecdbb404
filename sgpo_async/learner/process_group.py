"""The process group of the ranks that torchrun starts: gloo on CPUs, gloo and NCCL on GPUs.

torchrun gives all attempts of a job the same store (with the static, --standalone and c10d rendezvous), in which a
restarted rank would find the addresses of dead ranks. No environment variable names the attempt on all nodes:
TORCHELASTIC_RESTART_COUNT differs between nodes, because each torchrun counts only the failures of its own workers.
Therefore the ranks agree on a name for each attempt, and prefix all keys of the process group with it (see `agree`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sgpo_async.config.schema import Learner, require
from sgpo_async.errors import DeadlineExceeded

log = logging.getLogger(__name__)

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
Item = TypeVar("Item")
POLL_S = 0.02  # between two reads of the store


def join_world(learner: Learner, *, timeout_s: float) -> DeviceMesh:
    """Join the process group of all ranks; return the mesh over which parameters are sharded, see `mesh_of`.

    Args:
        timeout_s: the timeout of every collective. It must be longer than a rank may wait for its batch, because the
            other ranks may already have theirs.

    Raises:
        ConfigError: the mesh that `learner.shard_over` describes does not exist.
        DeadlineExceeded: not all ranks have started within `timeout_s`.
    """
    device = device_for(gpus=torch.cuda.device_count(), ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        # By default gloo listens on the address of the host name, which may not be an address of this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    timeout = timedelta(seconds=timeout_s)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agree(store, rank, ranks, timeout_s=timeout_s), store)
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=ranks, timeout=timeout)
    return mesh_of(learner, device, timeout_s=timeout_s)


def mesh_of(learner: Learner, device: str, *, timeout_s: float) -> DeviceMesh:
    """Create the mesh over whose last dimension parameters are sharded: [ranks], or [nodes, ranks of a node].

    With two dimensions the parameters are replicated over the first (hybrid sharding). A collective of all ranks.

    Raises ConfigError if nodes with different numbers of ranks cannot have the same shards.
    """
    ranks, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    counts = [here] * ranks
    dist.all_gather_object(counts, here)
    require(
        learner.shard_over == "world" or len(set(counts)) == 1,
        "learner.shard_over",
        f"must be world if nodes have different numbers of ranks ({min(counts)} to {max(counts)})",
        learner.shard_over,
    )
    shards = learner.shards(ranks=ranks, here=here)
    if shards == ranks:
        return init_device_mesh(device, (ranks,))
    # init_device_mesh would give these groups torch's own timeout, which may be shorter than the wait for a batch.
    layout, timeout = torch.arange(ranks).view(-1, shards), timedelta(seconds=timeout_s)
    within, _ = dist.new_subgroups_by_enumeration(layout.tolist(), timeout=timeout)
    across, _ = dist.new_subgroups_by_enumeration(layout.T.tolist(), timeout=timeout)
    return DeviceMesh.from_group([across, within], device, mesh=layout, mesh_dim_names=("node", "rank"))


def agree(store: dist.Store, rank: int, ranks: int, *, timeout_s: float) -> str:
    """Return a new name, the same on all ranks of this attempt, even if `store` has keys of earlier attempts.

    Each process announces a random token. Rank 0 proposes the tokens that it finds. Since some may be those of dead
    processes, it proposes again when a token changes. A process confirms only a proposal with its own token. The name,
    a digest of the proposed tokens, is agreed when every rank has confirmed it.

    Raises DeadlineExceeded after `timeout_s`.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    everyone = range(ranks)
    store.set(f"token/{rank}", token)
    proposed = confirmed = ""
    while True:
        if rank == 0:
            found = _read(store, [f"token/{i}" for i in everyone])
            if found and (tokens := " ".join(found)) != proposed:
                proposed = tokens
                store.set("proposal", proposed)
        else:
            proposed = "".join(_read(store, ["proposal"]))
        name = hashlib.sha256(proposed.encode()).hexdigest()[:32]
        if proposed.split()[rank : rank + 1] == [token]:
            if name != confirmed:
                store.set(f"confirmed/{rank}", confirmed := name)
            if rank == 0 and set(_read(store, [f"confirmed/{i}" for i in everyone])) == {name}:
                store.set("agreed", name)
            if _read(store, ["agreed"]) == [name]:
                return name
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"learner rank {rank}", f"start of all {ranks} ranks", timeout_s)
        time.sleep(POLL_S)


def _read(store: dist.Store, keys: list[str]) -> list[str]:
    """Return the values of `keys`, or nothing unless the store has all of them. Does not wait."""
    return [value.decode() for value in store.multi_get(keys)] if store.check(keys) else []


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any rank. A collective of all ranks."""
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def exchange(outgoing: Sequence[Item]) -> list[Item]:
    """Send the i-th object to rank i; return what each rank has sent to this one. A collective of all ranks."""
    encoded = [pickle.dumps(item) for item in outgoing]
    sizes = torch.tensor([len(part) for part in encoded])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    incoming = torch.empty(int(coming.sum()), dtype=torch.uint8)
    whole = torch.frombuffer(bytearray().join(encoded), dtype=torch.uint8)
    dist.all_to_all_single(incoming, whole, coming.tolist(), sizes.tolist())
    return [pickle.loads(part.numpy().tobytes()) for part in incoming.split(coming.tolist())]


def join_alone(device: str = "cpu") -> DeviceMesh:
    """Create a process group of world size 1 on `device`, without torchrun or sockets, unless there is one already."""
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[device], store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,))


def _loopback() -> str:
    """Return the name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def device_for(*, gpus: int, ranks: int) -> str:
    """Return "cuda" if each rank of the node can have its own GPU, as NCCL requires, otherwise "cpu"."""
    if 0 < gpus < ranks:
        log.warning("%d ranks use the CPU; start at most %d ranks to use the GPUs of this node", ranks, gpus)
    return "cuda" if gpus >= ranks else "cpu"
