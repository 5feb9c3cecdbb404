"""Opens the problem source of a run, or a source of a given kind."""

from __future__ import annotations

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.files import FileSource


def open_source(kind: str, *, path: str, held_out: int, seed: int) -> ProblemSource:
    """The source "cues" or "file" (at `path`), with `held_out` problems set aside for evaluation."""
    if kind == "cues":
        return CuesSource(seed=seed, held_out=held_out)
    assert kind == "file", kind
    return FileSource(path, held_out=held_out, seed=seed)


def source_of(run: Run) -> ProblemSource:
    """The source that `run` trains on.

    Raises:
        DataError: the source is unreadable, or the objective needs responses and no training problem has one.
    """
    tasks, objective = run.tasks, run.algorithm.objective
    source = open_source(tasks.source, path=tasks.path, held_out=tasks.held_out, seed=run.seed)
    if run.algorithm.needs_responses and not source.has_responses:
        raise DataError(
            f"{tasks.path}: algorithm.objective={objective} needs responses, but no training problem has one; "
            "add the column 'response', or choose sgpo or grpo"
        )
    return source
