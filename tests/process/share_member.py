"""One rank of several that publish into stores which the test owns.

    python share_member.py FOLDER RANK RANKS SCENARIO ...

FOLDER/stores.json has the path of each scenario's store. After each scenario the rank writes what it found to
FOLDER/SCENARIO-RANK.pt: the error, if any, and on rank 0 what was trained when each version was published.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sgpo_async.config.schema import Lora
from sgpo_async.errors import SgpoError
from sgpo_async.learner import loading, share_group
from sgpo_async.learner.policy import Policy
from sgpo_async.learner.publish import Publisher, gather_trained
from sgpo_async.weights import StoreWriter, shares
from tests.reference import learner_cases as cases

DTYPE = torch.bfloat16
VERSIONS = 3
FAULTY = 1  # the rank that something happens to, in the middle of its share of the version 1


def policy(lora: int = 0) -> Policy:
    run = cases.settings()
    run = replace(run, learner=replace(run.learner, precision="float32", lora=Lora(rank=lora)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return loading.prepare(Policy(cases.tiny_model(dtype=torch.float32)), run, mesh)


def published(trained: Policy, path: str) -> dict[str, Any]:
    """Publish VERSIONS versions, each of other values.

    What they should be is gathered before the first is published: later, the faulty rank may be gone.
    """
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    expected, values, error = [], [], ""
    for version in range(VERSIONS):
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.add_(0.01 * (version + 1) * (number + 1))
        expected.append(gather_trained(trained, DTYPE))
        values.append([parameter.detach().clone() for parameter in parameters])
    store = StoreWriter(path) if dist.get_rank() == 0 else None
    dist.barrier()  # ROUND_S may be shorter than it takes a busy machine to make the policy
    publisher = Publisher(trained, DTYPE, store=store, published=lambda *_: None)
    for version in range(VERSIONS):
        with torch.no_grad():
            for parameter, value in zip(parameters, values[version], strict=True):
                parameter.copy_(value)
        try:
            publisher.publish(version)
            if version == VERSIONS - 1:
                publisher.close()
        except SgpoError as failure:
            error = str(failure)
            break
    return {"expected": expected, "error": error, "senders": publisher._group._senders}


def in_the_middle(fault: Callable[[Any], None]) -> Callable[..., None]:
    """`write_part` that calls `fault` with the part at the second part of version 1, before it writes it."""
    parts = [0]

    def write_part(fd: int, data: int, share: shares.Share, first: int, part: memoryview) -> None:
        parts[0] += first == 0  # every version begins there
        if dist.get_rank() == FAULTY and parts[0] == 2 and first == share_group.PART_BYTES:
            part = memoryview(bytearray(part))
            fault(part)
        shares.write_part(fd, data, share, first, part)

    return write_part


def flip(part: memoryview) -> None:
    part[7] ^= 1


def no_room(_: memoryview) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def die(_: memoryview) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: memoryview) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def scenario(name: str, path: str) -> dict[str, Any]:
    rank, faults = dist.get_rank(), {"damaged": flip, "full": no_room, "killed": die, "stopped": stop}
    fault = in_the_middle(faults[name]) if name in faults else shares.write_part
    host = f"machine of rank {rank}" if name == "remote" and rank else share_group.machine()
    share_group.ROUND_S = 30.0 if name == "stopped" else 300.0
    with patch.object(share_group, "write_part", fault), patch.object(share_group, "machine", lambda: host):
        found = published(policy(lora=1 if name == "lora" else 0), path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


def main() -> None:
    folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    share_group.PART_BYTES, share_group.READ_BYTES, shares.BLOCK_BYTES = 1000, 3000, 700
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
    )
    for name in sys.argv[4:]:
        path = json.loads((folder / "stores.json").read_text())[name]
        torch.save(scenario(name, path), folder / f"draft-{rank}")
        (folder / f"draft-{rank}").rename(folder / f"{name}-{rank}.pt")  # with this name it is complete
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
