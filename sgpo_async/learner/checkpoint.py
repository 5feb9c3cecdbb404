"""Checkpoints of learner, optimiser, teacher, random state, progress and hub state, written atomically.

checkpoints/.step-00000040/      every rank writes its shards here
checkpoints/step-00000040/       then rank 0 renames the folder: a folder with this name is complete and on disk
    *.distcp, .metadata          parameters, optimiser, a teacher that changes (torch.distributed.checkpoint; can be
                                 loaded by any number of ranks)
    progress.json  hub.state     written by rank 0
    random-0.pt ...              written by each rank
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
    """The contents of a checkpoint besides parameters and optimiser."""

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
    """Write the checkpoint of `step` into a new folder below `folder`; return it. A collective of all ranks.

    Args:
        teacher: the teacher's copy of the module, if it changes during the run.

    Raises:
        CheckpointError: on every rank, if any rank cannot write. Older checkpoints are unchanged.
    """
    final, draft, rank = folder / f"step-{step:08d}", folder / f".step-{step:08d}", dist.get_rank()
    what = f"{final}: cannot write the checkpoint"
    try:
        _write(draft, what, state=_state(module, optimiser, teacher), saved=saved)
    except CheckpointError as error:
        full = disk_full(folder)
        dist.barrier()  # now every rank has checked the disk and stopped writing
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(f"{what}: the disk is full; {FREE_SOME}") if full else error from None
    with _fail_on_all_ranks(what):
        if rank == 0:
            _sync(draft)
            shutil.rmtree(final, ignore_errors=True)  # left by an earlier attempt of the run that reached this step
            draft.rename(final)
            _sync(folder)
    return final


def _write(draft: Path, what: str, *, state: dict[str, Any], saved: Saved) -> None:
    rank = dist.get_rank()
    with _fail_on_all_ranks(what):
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            (draft / "progress.json").write_text(json.dumps(saved.progress), encoding="utf-8")
            (draft / "hub.state").write_bytes(saved.hub_state)
    with _fail_on_all_ranks(what):
        torch.save(torch.get_rng_state(), draft / f"random-{rank}.pt")
    with _fail_on_all_ranks(what):
        dcp.save(state, checkpoint_id=draft)
    with _fail_on_all_ranks(what):
        for path in draft.iterdir():  # on every rank: on a network disk each host syncs only its own writes
            _sync(path)


def prune(folder: Path, *, step: int, keep: int) -> None:
    """Delete old checkpoints, except the newest `keep` ones up to `step`. A collective of all ranks.

    Checkpoints of steps after `step` belong to an earlier attempt of the run that was not resumed. They are kept.

    Raises:
        CheckpointError: on every rank, if an old checkpoint cannot be deleted.
    """
    assert keep >= 1, f"keep must be >= 1, got {keep}"
    with _fail_on_all_ranks(f"{folder}: cannot delete old checkpoints"):
        if dist.get_rank() == 0:
            past = sorted((path for path in _complete(folder) if _step(path) <= step), key=_step)
            for path in [*past[:-keep], *folder.glob(".step-*")]:  # a name with a dot marks an incomplete checkpoint
                shutil.rmtree(path)


def set_aside(folder: Path) -> Path | None:
    """Rename the folder with the checkpoints of an earlier run of the same name; return the new folder, if any.

    Resuming loads the checkpoint of the highest step, which could otherwise be one of the earlier run. Nothing is
    deleted.
    """
    if not _complete(folder):
        return None
    names = (folder.with_name(f"{folder.name}.earlier-{number}") for number in count(1))
    return folder.rename(next(path for path in names if not path.exists()))


def latest(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step below `folder`, or None if there is none."""
    return max(_complete(folder), key=_step, default=None)


def restore(
    checkpoint: Path, *, module: nn.Module, optimiser: torch.optim.Optimizer, teacher: nn.Module | None = None
) -> Saved:
    """Load a checkpoint into `module`, `optimiser` and `teacher`. A collective of all ranks.

    The number of ranks may differ from the number that wrote the checkpoint.

    Raises:
        CheckpointError: on every rank, if any rank cannot read the checkpoint.
    """
    with _fail_on_all_ranks(f"{checkpoint}: cannot read the checkpoint; delete it to resume from the one before"):
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        saved = Saved(progress, (checkpoint / "hub.state").read_bytes())
        random = checkpoint / f"random-{dist.get_rank()}.pt"
        if random.exists():
            torch.set_rng_state(torch.load(random))
    with _fail_on_all_ranks(f"{checkpoint}: cannot read the checkpoint, or it belongs to another model or teacher"):
        state = _state(module, optimiser, teacher)
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(module, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
        if teacher:
            set_model_state_dict(teacher, state["teacher"])
    return saved


def _complete(folder: Path) -> list[Path]:
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
def _fail_on_all_ranks(what: str) -> Iterator[None]:
    """Raise CheckpointError on every rank if one rank fails; otherwise a rank could wait forever in a collective."""
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
