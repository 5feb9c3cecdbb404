"""Opens the problem source of a run, or a source of a given kind."""

from __future__ import annotations

from collections.abc import Sequence

from sgpo_async.config.schema import Run, Tasks
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import Problem, ProblemSource
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.files import FileSource, Problems
from sgpo_async.tasks.records import Form
from sgpo_async.tasks.rewards import to_text
from sgpo_async.tasks.rows import open_rows

DEFAULTS = Tasks()
GENERATED = 8


def open_source(kind: str, *, path: str, held_out: int, seed: int, tasks: Tasks = DEFAULTS) -> ProblemSource:
    """The source "cues" or "file" (at `path`), with `held_out` problems set aside for evaluation.

    Args:
        tasks: how the file's records are read, and the reward.
    """
    assert kind in ("cues", "file"), kind
    source: CuesSource | FileSource
    if kind == "cues":
        source = CuesSource(seed=seed, held_out=held_out)
    else:
        part = (tasks.dataset_config, tasks.split)
        source = FileSource(path, held_out=held_out, seed=seed, form=Form.of(tasks), part=part)
    source.verifier = to_text(tasks.reward) or source.verifier
    return source


def problems_of(run: Run) -> Sequence[Problem]:
    """All problems of the run's file, each read and checked only when it is asked for; a few of a generated source."""
    tasks = run.tasks
    if tasks.source == "cues":
        source = open_source("cues", path="", held_out=tasks.held_out, seed=run.seed)
        return [source.training(position) for position in range(GENERATED)]
    rows = open_rows(tasks.path, config=tasks.dataset_config, split=tasks.split)
    return Problems(rows, Form.of(tasks), range(len(rows)))


def source_of(run: Run) -> ProblemSource:
    """The source that `run` trains on.

    Raises:
        DataError: the source is unreadable, or the objective needs responses and no training problem has one.
    """
    tasks, objective = run.tasks, run.algorithm.objective
    source = open_source(tasks.source, path=tasks.path, held_out=tasks.held_out, seed=run.seed, tasks=tasks)
    if run.algorithm.needs_responses and not source.has_responses:
        raise DataError(
            f"{tasks.path}: algorithm.objective={objective} needs responses, but no training problem has one; "
            "add the column 'response', or choose sgpo or grpo"
        )
    return source
