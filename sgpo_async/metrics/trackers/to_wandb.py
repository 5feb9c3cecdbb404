"""Weights & Biases, by its package: online with an API key, else offline in runs/NAME/wandb/.

Where it writes, and as whom, is W&B's own choice: WANDB_API_KEY or `wandb login`, WANDB_MODE, WANDB_ENTITY,
WANDB_PROJECT, WANDB_BASE_URL. An offline run that is resumed has a second folder with the same id, which
`wandb sync --append` joins.
"""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import wandb

from sgpo_async.metrics.trackers.base import COLUMNS, About

OFFLINE = ("offline", "dryrun")
HOST = "https://api.wandb.ai"
OPEN_S = 30.0  # for the first answer of the server; after that, W&B's own process waits for it


class WandB:
    """One run; its service is another process, which keeps on the disk what it cannot send yet."""

    def __init__(self, about: About) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        offline = mode in OFFLINE
        self.state = replace(about.state, id=about.state.id or uuid.uuid4().hex[:12])
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            init_timeout=OPEN_S,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or about.project,
            name=about.name,
            id=self.state.id,
            resume=None if offline else "allow",
            reinit="finish_previous",
            mode=cast(Any, mode),
            dir=about.folder,
            config=dict(about.config),
            settings=settings,
        )
        if not offline:  # the server knows its next step; a process that was killed may not have sent its last ones
            self.state.step = max(self._run.step - 1, 0)
        self.note = f"offline; to upload it: wandb sync --append {self._run.settings.sync_dir}" if offline else ""

    def step(self, step: int, values: Mapping[str, float], counts: Mapping[str, Mapping[int, float]]) -> None:
        """One line of the run's history."""
        drawn = {name: wandb.Histogram(np_histogram=_bins(count)) for name, count in counts.items()}
        self._run.log({**values, **drawn}, step=step)

    def samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """A table, at the newest step: the history of W&B does not go back."""
        self._run.log(
            {"train/samples": wandb.Table(columns=list(COLUMNS), data=list(rows))}, step=max(step, self.state.step)
        )

    def summary(self, values: Mapping[str, float]) -> None:
        """Keys of the run's summary beside the last value of each metric."""
        self._run.summary.update({f"final/{name}": value for name, value in values.items()})

    def close(self, *, finished: bool) -> None:
        """Wait until everything is sent, or offline on the disk."""
        self._run.finish(exit_code=0 if finished else 1)


def open_run(about: About) -> WandB:
    """Begin or resume the run."""
    return WandB(about)


def _has_key() -> bool:
    """Whether W&B has an API key here: without one it would ask for it, or refuse."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or HOST).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _bins(counts: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Counts of 0, 1, ..., the largest lag, and the edges between them."""
    most = max(counts)
    return np.array([counts.get(lag, 0.0) for lag in range(most + 1)]), np.arange(most + 2) - 0.5
