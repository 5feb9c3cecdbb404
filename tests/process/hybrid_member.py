"""One rank of four on two nodes, whose parameters are sharded over the world or within each node.

    torchrun --nnodes 2 --nproc-per-node 2 ... hybrid_member.py FOLDER

Rank 0 writes to FOLDER/found.pt, for both meshes, what it found. Every rank trains on one problem.
"""

import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sgpo_async.config.schema import Learner
from sgpo_async.learner import checkpoint, loading, optimiser, policy, share_group, step
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.process_group import join_world, mesh_of
from sgpo_async.learner.publish import Publisher, gather
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter
from tests.reference import learner_cases as cases

TIMEOUT_S = 240.0
RUN = cases.settings(row_tokens=20, teacher="ema", teacher_decay=0.7)  # several micro-batches on each rank


def learner(folder: Path, mesh: DeviceMesh) -> Stepper:
    run, model = replace(RUN, learner=replace(RUN.learner, precision="float32")), str(folder / "model")
    loaded, teacher = loading.load_policy(model, run, mesh), loading.load_teacher(model, run, mesh)
    return Stepper(run, loaded, optimiser.build(loaded, run.optim), Teacher(run.algorithm, teacher))


def train(stepper: Stepper, steps: range) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    shards = (cases.shard_of([cases.groups(seed=number)[rank]], problems=4, step=number) for number in steps)
    return [stepper.update(shard) for shard in shards]


def gradients(stepper: Stepper) -> dict[str, Any]:
    """The gradient of one step, and how often each collective was called on the way."""
    mesh = next(stepper.policy.parameters()).device_mesh
    calls: list[Any] = []
    backwards: list[int] = []
    reduce, synchronise = dist.all_reduce, stepper._synchronise

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("group"))
        return reduce(tensor, *args, **kwargs)

    def observed(last: bool) -> None:
        backwards.append(last)
        synchronise(last)

    dist.all_reduce, stepper._synchronise = counted, observed
    shard = cases.shard_of([cases.groups()[dist.get_rank()]], problems=4)
    stepper.accumulate(stepper.batch(shard))
    dist.all_reduce = reduce
    between = mesh.get_group("node") if mesh.ndim == 2 else None
    return {
        "gradient": {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()},
        "micro-batches": len(backwards),
        "between nodes": sum(group is not None and group is between for group in calls),
    }


def published(stepper: Stepper) -> dict[str, Any]:
    """What a store of rank 0 holds after a publication, and which ranks wrote into it or sent their bytes."""
    with closing(StoreFile("/nowhere")) as file, patch.object(share_group, "machine", lambda: os.environ["GROUP_RANK"]):
        store = StoreWriter(file.path) if dist.get_rank() == 0 else None
        publisher = Publisher(stepper.policy, torch.float32, store=store, published=lambda *_: None)
        publisher.publish(1)
        publisher.close()
        tensors = StoreReader(file.path).tensors(1) if store else {}
    member = publisher._group.member
    return {"tensors": tensors, "senders": publisher._group._senders if member else [], "members": _where(member)}


def _where(flag: bool) -> list[int]:
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return [rank for rank, own in enumerate(flags) if own]


def resumed(checkpoints: Path, fresh: Stepper) -> Stepper:
    written = checkpoint.newest_whole(checkpoints)
    assert written is not None
    checkpoint.restore(written, module=fresh.policy, optimiser=fresh.optimiser, teacher=fresh.teacher.moving)
    return fresh


def everything(folder: Path, mesh: DeviceMesh) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": tuple(mesh.shape), "small": gradients(learner(folder, mesh))}
    policy.GROUP_BYTES = step.LOCAL_GRADIENT_BYTES = 0
    found["large"] = gradients(learner(folder, mesh))
    uninterrupted = learner(folder, mesh)
    found["metrics"] = train(uninterrupted, range(3))
    found["published"] = dict(gather(uninterrupted.policy))
    found["store"] = published(uninterrupted)
    first, checkpoints = learner(folder, mesh), folder / f"checkpoints-{mesh.ndim}"
    found["resumed"] = train(first, range(2))
    with CheckpointWriter(checkpoints, keep=1) as writer:
        state = {"module": first.policy, "optimiser": first.optimiser, "teacher": first.teacher.moving}
        writer.save(step=2, saved=Saved({"step": 2}, b""), **state)
    second = resumed(checkpoints, learner(folder, mesh))
    found["resumed"] += train(second, range(2, 3))
    found["weights"] = {name: p.detach().full_tensor() for name, p in uninterrupted.policy.model.named_parameters()}
    found["resumed weights"] = {name: p.detach().full_tensor() for name, p in second.policy.model.named_parameters()}
    found["held"] = sum(p.to_local().numel() for p in second.policy.parameters())
    policy.GROUP_BYTES, step.LOCAL_GRADIENT_BYTES = 32 * 2**20, 2**30
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    mesh = join_world(Learner(), timeout_s=TIMEOUT_S)
    found = {"node": everything(folder, mesh)}
    world = mesh_of(Learner(shard_over="world"), "cpu", timeout_s=TIMEOUT_S)
    found["world"] = everything(folder, world)
    found["crossed"] = train(resumed(folder / "checkpoints-2", learner(folder, world)), range(2, 3))
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
