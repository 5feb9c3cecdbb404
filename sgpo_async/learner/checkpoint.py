"""Checkpoints: learner, optimiser, teacher, random numbers, progress, the hub's state; whole or not at all.

checkpoints/.step-00000040/      every rank writes its shards here
checkpoints/step-00000040/       then rank 0 gives the folder its name: what has a name is whole, and on the disk
    *.distcp, .metadata          parameters, optimiser, a teacher that moves (torch.distributed.checkpoint; any
                                 number of ranks)
    progress.json  hub.state     rank 0
    random-0.pt ...              each rank
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from sgpo_async.errors import CheckpointError
from sgpo_async.files import FREE_SOME, disk_full


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds besides parameters and optimiser."""

    progress: dict[str, Any]  # plain data
    hub_state: bytes


def save(
    folder: Path,
    *,
    step: int,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    saved: Saved,
    teacher: nn.Module | None = None,
) -> Path:
    """Write the checkpoint of `step` below `folder`; return its own folder. A collective of all ranks.

    Args:
        teacher: a copy of the module that is neither it nor the model that the run began with.

    Raises:
        CheckpointError: on every rank, if any of them cannot write. Older checkpoints stay as they are.
    """
    final, draft, rank = folder / f"step-{step:08d}", folder / f".step-{step:08d}", dist.get_rank()
    what = f"{final}: the checkpoint cannot be written"
    try:
        _write(draft, what, state=_state(module, optimiser, teacher), saved=saved)
    except CheckpointError as error:
        full = disk_full(folder)
        dist.barrier()  # all have looked, and nobody writes any more
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(f"{what}: its disk is full; {FREE_SOME}") if full else error from None
    with _together(what):
        if rank == 0:
            _sync(draft)
            shutil.rmtree(final, ignore_errors=True)  # of an earlier life that got to this step
            draft.rename(final)
            _sync(folder)
    return final


def _write(draft: Path, what: str, *, state: dict[str, Any], saved: Saved) -> None:
    rank = dist.get_rank()
    with _together(what):
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            (draft / "progress.json").write_text(json.dumps(saved.progress), encoding="utf-8")
            (draft / "hub.state").write_bytes(saved.hub_state)
    with _together(what):
        torch.save(torch.get_rng_state(), draft / f"random-{rank}.pt")
    with _together(what):
        dcp.save(state, checkpoint_id=draft)
    with _together(what):
        for path in draft.iterdir():  # on every rank: on a network disk each host syncs what it wrote itself
            _sync(path)


def prune(folder: Path, *, step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to that of `step`, the one just saved. A collective of all ranks.

    Those of later steps are of an earlier life that was not resumed: they are left to whoever wants them.

    Raises:
        CheckpointError: on every rank, if an old one cannot be deleted.
    """
    assert keep >= 1
    with _together(f"{folder}: old checkpoints cannot be deleted"):
        if dist.get_rank() == 0:
            past = sorted((path for path in _whole(folder) if _step(path) <= step), key=_step)
            for path in [*past[:-keep], *folder.glob(".step-*")]:  # the latter were never finished
                shutil.rmtree(path)


def set_aside(folder: Path) -> Path | None:
    """Move the checkpoints of an earlier run of this name out of the way of one that begins afresh; returns where to.

    Resuming takes up the highest step there is, and that would be the other's. Nothing is deleted.
    """
    if not _whole(folder):
        return None
    free = next(
        place for number in count(1) if not (place := folder.with_name(f"{folder.name}.earlier-{number}")).exists()
    )
    return folder.rename(free)


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step below `folder`."""
    return max(_whole(folder), key=_step, default=None)


def restore(
    checkpoint: Path, *, module: nn.Module, optimiser: torch.optim.Optimizer, teacher: nn.Module | None = None
) -> Saved:
    """Load a checkpoint in place. A collective of all ranks, of which there may be more or fewer than before.

    Raises:
        CheckpointError: on every rank, if any of them cannot read it.
    """
    with _together(f"{checkpoint}: the checkpoint cannot be read; delete it to go on from the one before"):
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        saved = Saved(progress, (checkpoint / "hub.state").read_bytes())
        random = checkpoint / f"random-{dist.get_rank()}.pt"
        if random.exists():
            torch.set_rng_state(torch.load(random))
    with _together(f"{checkpoint}: the checkpoint cannot be read, or is of another model or teacher"):
        state = _state(module, optimiser, teacher)
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(module, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
        if teacher:
            set_model_state_dict(teacher, state["teacher"])
    return saved


def _whole(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(module: nn.Module, optimiser: torch.optim.Optimizer, teacher: nn.Module | None) -> dict[str, Any]:
    model, optim = get_state_dict(module, optimiser)
    return {"model": model, "optimiser": optim} | ({"teacher": get_model_state_dict(teacher)} if teacher else {})


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Fail on every rank if one fails, so that no rank goes on to a collective that another never reaches."""
    failure = ""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        failure = f"{type(cause).__name__}: {cause}"
    except (OSError, RuntimeError, ValueError) as error:
        failure = f"{type(error).__name__}: {error}"
    failures = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for rank, reason in enumerate(failures):
        if reason:
            raise CheckpointError(f"{what} (rank {rank}: {reason.splitlines()[0]})")
