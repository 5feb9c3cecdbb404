"""The jobs of a worker process: make a base policy, run a trial. Only the worker imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_async.config import load
from sgpo_async.config.experiment import Base
from sgpo_async.errors import SgpoError
from sgpo_async.experiments.identity import Plain
from sgpo_async.files import to_json, write_whole
from sgpo_async.model.folder import model_folder


class TrialJob(NamedTuple):
    """One trial: its identity, and the configuration as a file and overrides."""

    id: str
    config: str
    overrides: tuple[str, ...]


class BaseJob(NamedTuple):
    """One base policy to make in `folder`; `start` is a model's path or empty; `recipe` is stored with the base."""

    name: str
    base: Base
    start: str
    folder: str
    config: str
    overrides: tuple[str, ...]
    recipe: Plain


def run_trial(job: TrialJob) -> dict[str, Any]:
    """Train and evaluate; returns the result."""
    _prepare()
    from sgpo_async.experiments.trial import TrialRun

    return TrialRun(load(job.config, job.overrides)).train()


def make_base(job: BaseJob) -> dict[str, Any]:
    """Write the folder of the model, completely or not at all; returns the pass rates of the base.

    Raises SgpoError if its training diverges.
    """
    _prepare()

    from sgpo_async.experiments.trial import TrialRun
    from sgpo_async.learner.publish import gather
    from sgpo_async.model.export import export
    from sgpo_async.tasks.pretrain import Recipe, pretrain

    part = Path(f"{job.folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    if job.base.train:
        trial = TrialRun(load(job.config, job.overrides))
        result = trial.train()
        if (diverged := result["diverged"]) is not None:
            raise SgpoError(
                f"bases.{job.name}.train: must finish its {result['steps']} steps, diverged at step {diverged['step']} "
                f"({diverged['why']}); lower its optim.lr"
            )
        rates = result["test"]
        export(
            trial.stepper.policy.model,
            dict(gather(trial.stepper.policy)),
            part,
            source=model_folder(job.start),
        )
    else:
        rates = pretrain(Recipe(**job.base.pretraining), out=part, start=model_folder(job.start) if job.start else None)
    write_whole(part / "base.json", to_json({"recipe": job.recipe, "pass_rates": rates}))
    part.rename(job.folder)
    return rates


def _prepare() -> None:
    import torch
    from transformers.utils import logging

    from sgpo_async.learner.process_group import join_alone

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    join_alone()
