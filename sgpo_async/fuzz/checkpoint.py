"""Damaged checkpoints where a run resumes and where a policy is tried."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from torch import nn

from sgpo_async.errors import CheckpointError
from sgpo_async.fuzz.mutate import changed_bytes, changed_plain
from sgpo_async.fuzz.outcome import Record, refusal
from sgpo_async.learner.checkpoint import MANIFEST, CheckpointWriter, Saved, newest_whole, read_weights, restore
from sgpo_async.learner.process_group import join_alone

log = logging.getLogger("sgpo_async.learner.checkpoint")
STEP = "step-00000001"


def attacks(seed: int, inputs: int, record: Record) -> None:
    """Damage one file of a checkpoint, `inputs` times. What is read after all must be what was saved."""
    join_alone()
    quiet, log.disabled = log.disabled, True  # not a line for each damaged checkpoint
    try:
        with tempfile.TemporaryDirectory() as folder:
            _damage(Path(folder), seed, inputs, record)
    finally:
        log.disabled = quiet
        dist.destroy_process_group()


def _damage(folder: Path, seed: int, inputs: int, record: Record) -> None:
    torch.manual_seed(seed)
    module, optimiser = _learner()
    saved = [parameter.detach().clone() for parameter in module.parameters()]
    with CheckpointWriter(folder / "whole", keep=1) as writer:
        writer.save(step=1, module=module, optimiser=optimiser, saved=Saved({"step": 1}, b"state of the hub"))
    for number in range(inputs):
        random = Random(f"{seed} {number}")
        damaged = folder / "damaged" / STEP
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder / "whole" / STEP, damaged)
        _change(random.choice(sorted(damaged.iterdir())), random)
        module, optimiser = _learner()
        try:
            if random.random() < 0.5:
                read_weights(damaged, module)
            else:
                found = newest_whole(damaged.parent)
                assert found is not None
                assert restore(found, module=module, optimiser=optimiser).hub_state == b"state of the hub"
        except CheckpointError as error:
            record(refusal(error))
            continue
        assert all(torch.equal(own, right) for own, right in zip(module.parameters(), saved, strict=True)), damaged
        record("accepted")


def _learner() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimiser.step()
    return module, optimiser


def _change(path: Path, random: Random) -> None:
    """Damage a file, take it away, or put a folder in its place."""
    content = path.read_bytes()
    if random.random() < 0.1:
        path.unlink()
        if random.random() < 0.5:
            path.mkdir()
    elif path.name == MANIFEST and random.random() < 0.7:
        path.write_text(json.dumps(changed_plain(json.loads(content), random), default=str))
    else:
        path.write_bytes(changed_bytes(content, random))
