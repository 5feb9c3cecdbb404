"""Checkpoints of learner, optimiser, teacher, random state, progress and hub state, written atomically.

checkpoints/.step-00000040/      every rank writes its shards here
checkpoints/step-00000040/       then rank 0 renames the folder: with this name it is complete and on disk
    *.distcp, .metadata          trained parameters, optimiser, a teacher that changes (torch.distributed.checkpoint;
                                 can be loaded by any number of ranks)
    progress.json  hub.state     written by rank 0
    random-0.pt ...              written by each rank
    manifest.json                size and xxh3_128 of every other file; written last, checked before a run resumes

The training loop waits only until the state is copied to memory. A background thread does the rest, with a process
group of its own, so that its collectives cannot interleave with those of the training loop.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from sgpo_async.errors import CheckpointError, DeadlineExceeded, SgpoError
from sgpo_async.files import FREE_SOME, disk_full, set_aside, step_folders, step_of
from sgpo_async.logs import fields
from sgpo_async.processes.progress import result_while_moving

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SAVE_S = 1800.0  # longest time in which no byte of a checkpoint is written, or read again for the manifest
OTHERS_S = 86400.0  # for other ranks to write their parts; one that is lost ends the wait at once
# The model of trained adapters is not saved; strict=False lets a state without it be loaded.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
CHUNK_BYTES = 2**22  # of a file that is hashed


@dataclass(frozen=True)
class Saved:
    """The contents of a checkpoint besides parameters and optimiser."""

    progress: dict[str, Any]  # plain data
    hub_state: bytes


class CheckpointWriter:
    """Writes checkpoints below `folder` in the background, one at a time, and deletes all but the newest `keep`.

    If `minutes` > 0, a checkpoint is also due `minutes` after the last one.

    Checkpoints of later steps than the one just written belong to an earlier attempt of the run that was not resumed.
    They are kept. Every method is a collective of all ranks.
    """

    def __init__(self, folder: Path, *, keep: int, minutes: float = 0.0) -> None:
        assert keep >= 1, f"keep must be >= 1, got {keep}"
        self._folder, self._keep, self._minutes = folder, keep, minutes
        self._began = time.monotonic()  # when the last checkpoint, or this writer, began
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=OTHERS_S))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._read = 0  # bytes of checkpoints that were read again for their manifests

    def due(self, by_steps: bool) -> bool:
        """Return whether a checkpoint is due, by steps or by rank 0's clock; the same value on all ranks."""
        if not self._minutes:
            return by_steps
        decision = torch.tensor([by_steps or time.monotonic() - self._began >= 60 * self._minutes])
        dist.broadcast(decision, 0)
        return bool(decision)

    def save(
        self,
        *,
        step: int,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        saved: Saved,
        teacher: nn.Module | None = None,
    ) -> None:
        """Wait until the previous checkpoint is written, copy the state of `step`, and begin to write the copy.

        Args:
            teacher: the teacher's copy of the module, if it changes during the run.

        Raises:
            CheckpointError: on every rank, if this checkpoint cannot be begun or the previous one cannot be written.
                Older checkpoints are unchanged.
            RuntimeError: on one rank, if the copy does not fit into its host's memory.
        """
        self.wait()
        self._began = time.monotonic()
        draft = self._folder / f".step-{step:08d}"
        with _fail_on_all_ranks(_cannot_write(draft), self._group):
            if dist.get_rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        state = dcp.async_save(
            _state(module, optimiser, teacher), checkpoint_id=draft, process_group=self._group
        )  # returns when the state is copied
        assert isinstance(state, Future)
        self._pending = self._thread.submit(self._write, draft, state, torch.get_rng_state(), saved)

    def __enter__(self) -> Self:
        """Use this writer until the end of the context."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Wait for the newest checkpoint. If the context ended with an error, log its failure instead of raising it."""
        try:
            self.wait()
        except SgpoError as failure:
            if error is None:
                raise
            log.warning("%s", failure)
        finally:
            self._thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the newest checkpoint is written.

        Raises CheckpointError on every rank if it could not be written, DeadlineExceeded after SAVE_S without progress.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            result_while_moving(pending, self._moved, SAVE_S)
        except TimeoutError:
            raise DeadlineExceeded("learner", "progress in writing a checkpoint", SAVE_S) from None
        except RuntimeError as error:  # a collective failed
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{self._folder}: cannot write a checkpoint; another rank is gone ({reason})"
            ) from None

    def _moved(self) -> int:
        """The bytes of the drafts and those read again. Threads of all ranks rename and delete files meanwhile."""
        total = self._read
        with suppress(FileNotFoundError):
            for path in self._folder.glob(".step-*/*"):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
        return total

    def _count(self, read: int) -> None:
        self._read += read

    def _write(self, draft: Path, state: Future[Any], random: Tensor, saved: Saved) -> None:
        what, rank = _cannot_write(draft), dist.get_rank()
        try:
            with _fail_on_all_ranks(what, self._group):
                try:
                    torch.save(random, draft / f"random-{rank}.pt")
                    if rank == 0:
                        (draft / "progress.json").write_text(json.dumps(saved.progress), encoding="utf-8")
                        (draft / "hub.state").write_bytes(saved.hub_state)
                finally:
                    state.result()  # also after an error, because its collectives use the same process group
            own: dict[str, dict[str, Any]] = {}
            with _fail_on_all_ranks(what, self._group):
                for path in draft.iterdir():
                    if _writer(path.name) == rank:  # on a network disk each host syncs only its own writes
                        _sync(path)
                        own[path.name] = _describe(path, self._count)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, own, group=self._group)
            with _fail_on_all_ranks(what, self._group):
                if rank == 0:
                    self._finish(draft, {name: entry for part in everyone for name, entry in part.items()})
        except CheckpointError as error:
            full = disk_full(self._folder)
            dist.barrier(self._group)  # now every rank has checked the disk and stopped writing
            if rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(f"{what}: the disk is full; {FREE_SOME}") if full else error from None
        with _fail_on_all_ranks(f"{self._folder}: cannot delete old checkpoints", self._group):
            if rank == 0:
                self._prune(step_of(_final(draft)))

    def _finish(self, draft: Path, files: dict[str, dict[str, Any]]) -> None:
        (draft / MANIFEST).write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")
        _sync(draft / MANIFEST)
        _sync(draft)
        shutil.rmtree(_final(draft), ignore_errors=True)  # left by an earlier attempt of the run that reached this step
        draft.rename(_final(draft))
        _sync(self._folder)
        log.info("checkpoint: %s", _final(draft), extra=fields(event="checkpoint", step=step_of(_final(draft))))

    def _prune(self, step: int) -> None:
        past = [path for path in step_folders(self._folder) if step_of(path) <= step]
        for path in [*past[: -self._keep], *self._folder.glob(".step-*")]:  # a name with a dot marks an incomplete one
            shutil.rmtree(path)


def set_checkpoints_aside(folder: Path) -> Path | None:
    """Rename the folder with the checkpoints of an earlier run of the same name; return the new folder, if any.

    Resuming loads the checkpoint of the highest step, which could otherwise be one of the earlier run. Nothing is
    deleted.
    """
    return set_aside(folder) if step_folders(folder) else None


def newest_complete(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step below `folder`, without a check of its files; None if there is none."""
    return max(step_folders(folder), key=step_of, default=None)


def read_weights(checkpoint: Path, module: nn.Module) -> None:
    """Load the policy's parameters of a checkpoint into `module`, which is not sharded; needs no process group.

    Raises CheckpointError if they cannot be read, for example because a training run has just deleted the checkpoint.
    """
    state = {"model": get_model_state_dict(module, options=TRAINED)}
    try:
        _check(checkpoint, rank=0, ranks=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says that there is no process group
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint}: cannot be read, or belongs to another model ({reason})") from None
    set_model_state_dict(module, state["model"], options=TRAINED)


def newest_whole(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step below `folder` whose files match its manifest.

    Logs each newer one that is damaged. Returns None if there is no checkpoint at all. A collective of all ranks.

    Raises:
        CheckpointError: on every rank, if there are checkpoints and all of them are damaged.
    """
    names = [[path.name for path in step_folders(folder)]]
    dist.broadcast_object_list(names)
    for name in reversed(names[0]):
        try:
            with _fail_on_all_ranks(f"{folder / name}: the checkpoint is damaged"):
                _check(folder / name, rank=dist.get_rank(), ranks=dist.get_world_size())
            return folder / name
        except CheckpointError as error:
            if dist.get_rank() == 0:
                log.warning("%s; trying the one before", error)
    if names[0]:
        raise CheckpointError(
            f"{folder}: all checkpoints are damaged ({', '.join(names[0])}); learner.resume=false begins anew"
        )
    return None


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
    other = "it belongs to another model, teacher, optim.state or learner.lora"
    with _fail_on_all_ranks(f"{checkpoint}: cannot read the checkpoint, or {other}"):
        state = _state(module, optimiser, teacher)
        dcp.load(state, checkpoint_id=checkpoint)
        model, optim = state["model"], state["optimiser"]
        set_state_dict(module, optimiser, model_state_dict=model, optim_state_dict=optim, options=TRAINED)
        if teacher:
            set_model_state_dict(teacher, state["teacher"])
    return saved


def _final(draft: Path) -> Path:
    return draft.with_name(draft.name.removeprefix("."))


def _cannot_write(draft: Path) -> str:
    return f"{_final(draft)}: cannot write the checkpoint"


def _writer(name: str) -> int:
    """Return the rank that writes the file of this name in a checkpoint."""
    found = re.fullmatch(r"__(\d+)_\d+\.distcp|random-(\d+)\.pt", name)
    return int(found[1] or found[2]) if found else 0


def _describe(path: Path, count: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Return the entry of a file in the manifest; `count` is told the bytes of each part that was read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            count(len(chunk))
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _check(checkpoint: Path, *, rank: int, ranks: int) -> None:
    """Compare the part of the files that this one of `ranks` ranks checks with the manifest.

    Raises OSError or ValueError.
    """
    text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    try:
        files = sorted(json.loads(text)["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} has no list of files ({error!r})") from None
    for name, expected in files[rank::ranks]:
        if (found := _describe(checkpoint / name)) != expected:
            raise ValueError(f"{name!r} must have {expected} according to {MANIFEST}, got {found}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(module: nn.Module, optimiser: torch.optim.Optimizer, teacher: nn.Module | None) -> dict[str, Any]:
    model, optim = get_state_dict(module, optimiser, options=TRAINED)
    return {"model": model, "optimiser": optim} | ({"teacher": get_model_state_dict(teacher)} if teacher else {})


@contextmanager
def _fail_on_all_ranks(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
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
    dist.all_gather_object(failures, failure, group=group)
    for rank, reason in enumerate(failures):
        if reason:
            raise CheckpointError(f"{what} (rank {rank}: {reason.splitlines()[0]})")
