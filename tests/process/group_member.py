"""One rank of a weight-update group, as a process: it does what SGLang's ranks do, and prints what it received.

    python group_member.py RANK ADDRESS PORT WORLD_SIZE GROUP

Standard input: one line to start the join, then one BroadcastPlan (JSON) per line.

The calls are those of SGLang 0.5.23 (`init_custom_process_group` in srt/utils/common.py, `WeightUpdater` in
srt/model_executor/model_runner_components/weight_updater.py, `FlattenedTensorBucket` in srt/weight_sync).
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,
    _world,
    default_pg_timeout,
    rendezvous,
)

from sgpo_async.weights import digest


def join(rank: int, address: str, port: int, *, world_size: int, group: str) -> dist.ProcessGroup:
    store, rank, world_size = next(rendezvous(f"tcp://{address}:{port}", rank, world_size, timeout=default_pg_timeout))
    store.set_timeout(default_pg_timeout)
    members, _ = _new_process_group_helper(
        world_size, rank, [], Backend("gloo"), PrefixStore(group, store), group_name=group, timeout=default_pg_timeout
    )
    _world.pg_group_ranks[members] = {i: i for i in range(world_size)}
    return members


def receive(broadcast: dict[str, list], members: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    layout, offset = [], 0
    for name, dtype, shape in zip(broadcast["names"], broadcast["dtypes"], broadcast["shapes"], strict=True):
        dtype, shape = getattr(torch, dtype), torch.Size(shape)
        assert offset % dtype.itemsize == 0, f"unaligned: {name}"
        layout.append((name, dtype, shape, offset))
        offset += shape.numel() * dtype.itemsize
    flat = torch.empty(offset, dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=members)
    return {n: flat[o : o + s.numel() * d.itemsize].view(d).reshape(s) for n, d, s, o in layout}


def main() -> None:
    rank, address, port, world_size, group = sys.argv[1:]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a server has a default group too
    print("started", flush=True)
    sys.stdin.readline()
    members = join(int(rank), address, int(port), world_size=int(world_size), group=group)
    print("joined", flush=True)
    for line in sys.stdin:
        tensors = {}
        for broadcast in json.loads(line)["broadcasts"]:
            tensors |= receive(broadcast, members)
            print("received", *broadcast["names"], flush=True)
        print("holds", digest(tensors.items()), flush=True)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        print("failed", str(error).partition("\n")[0], flush=True)
