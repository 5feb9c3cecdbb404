"""Whether this start of the learner continues an earlier one of the same run: `learner.resume`.

    true    yes
    false   no
    auto    yes, if torchrun has restarted the workers, or if this job has the same id (--rdzv-id) as the job that began
            the run, which a requeued Slurm job can have

The id is recorded because TORCHELASTIC_RESTART_COUNT counts neither a change of nodes nor a new torchrun.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from sgpo_async.config.schema import Run, require
from sgpo_async.files import set_aside, write_whole
from sgpo_async.learner.checkpoint import newest_whole, set_checkpoints_aside
from sgpo_async.metrics.reader import METRICS
from sgpo_async.metrics.samples import SAMPLES
from sgpo_async.processes.torchrun import repeated_command

log = logging.getLogger(__name__)

JOB = "job"  # file beside the checkpoints
RESUME = "learner.resume=true"


def continues(resume: Literal["auto", True, False], folder: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a start with these settings continues the run whose checkpoints are in `folder`."""
    if resume != "auto":
        return resume
    try:
        recorded = (folder / JOB).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        recorded = ""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 or (
        recorded != "" and recorded == _id(environment)
    )


def resume_point(run: Run, folder: Path) -> Path | None:
    """Return the checkpoint below `folder` that this start continues from, or None if the run begins anew.

    When a run begins anew, rank 0 moves aside what would be mixed up or lost: the checkpoints of an earlier run of this
    name, and metrics and samples of an attempt that should be continued but has no checkpoint. A collective of all
    ranks.

    Raises CheckpointError if there are only damaged checkpoints to continue from.
    """
    wanted = [False] * dist.get_world_size()  # each node's torchrun has its own count
    dist.all_gather_object(wanted, continues(run.learner.resume, folder))
    newest = newest_whole(folder) if any(wanted) else None
    if newest is None and dist.get_rank() == 0:
        if moved := set_checkpoints_aside(folder):
            log.info("%s: moved the checkpoints of an earlier run of this name to %s", folder, moved)
        metrics = Path(run.folder) / METRICS
        if any(wanted) and metrics.exists():
            log.warning(
                "%s: no checkpoint to resume from, beginning anew; moved the metrics of the earlier attempt to %s",
                folder,
                set_aside(metrics),
            )
            if (samples := Path(run.folder) / SAMPLES).exists():
                set_aside(samples)
        write_whole(folder / JOB, _id(os.environ))
    return newest


def require_same_adapters(run: Run, checkpoint: Path) -> None:
    """Raise ConfigError if the checkpoint belongs to another `learner.lora`, which gives its adapters their meaning."""
    try:
        saved = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")).get("lora")
    except (OSError, ValueError):
        return  # `restore` says what is wrong with the file
    own = asdict(run.learner.lora)
    for key, value in (saved or own).items():
        require(own[key] == value, f"learner.lora.{key}", f"must be {value!r}, as in {checkpoint}", own[key])


def how_to_go_on(reason: str, saved: int, hub: str = "") -> str:
    """Return the line of an interrupted learner: why it has ended, and the command that goes on.

    Args:
        saved: the step of its newest checkpoint; 0: none.
        hub: the address of its hub if that has ended, too.
    """
    if not saved:
        return f"interrupted before the first step: {reason}; there is no checkpoint to resume from"
    where = f"hub {hub}: " if hub else ""
    first = ", start the hub again, then" if hub else ""
    return f"{where}interrupted after step {saved}: {reason}; to go on{first}: {repeated_command(RESUME, rank=True)}"


def _id(environment: Mapping[str, str]) -> str:
    """Return the id of this torchrun job, or "" if it has none: "none" is torchrun's default."""
    job = environment.get("TORCHELASTIC_RUN_ID", "none")
    return "" if job == "none" else job
