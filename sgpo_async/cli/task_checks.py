"""Checks a run's own prompt and reward before a command starts anything: a mistake would end every actor."""

from __future__ import annotations

import logging
import os

from sgpo_async.config import Run
from sgpo_async.errors import CheckWarning
from sgpo_async.processes.marked import MARK

log = logging.getLogger(__name__)


def check_tasks(run: Run) -> None:
    """Check a chat template, and functions that the user wrote; log a warning for what works but may be a mistake.

    Plain prompts and built-in verifiers cannot fail, so nothing is checked for them and torch is not imported. A
    process that `local` started checks nothing, because `local` has. Raises SgpoError.
    """
    if MARK in os.environ:
        return
    from sgpo_async.tasks.rewards import is_builtin, to_text
    from sgpo_async.tasks.sources import problems_of

    reward = to_text(run.tasks.reward)
    if run.tasks.prompt != "plain":
        from sgpo_async.model.folder import load_tokenizer, model_folder
        from sgpo_async.tasks.prompts import check_prompt

        try:
            check_prompt(run, load_tokenizer(model_folder(run.model.path)), problems_of(run))
        except CheckWarning as warning:
            log.warning("%s", warning)
    if reward and not is_builtin(reward):
        from sgpo_async.tasks.self_check import check_reward

        check_reward(run, problems_of(run))
