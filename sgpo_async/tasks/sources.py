"""Opens the problem source of a run, or a source of a given kind."""

from __future__ import annotations

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ListedSource
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.files import FileSource


def open_source(kind: str, *, path: str, held_out: int, seed: int) -> ListedSource:
    """The source "cues" or "file" (at `path`), with `held_out` problems set aside for evaluation."""
    if kind == "cues":
        return CuesSource(seed=seed, held_out=held_out)
    assert kind == "file", kind
    return FileSource(path, held_out=held_out, seed=seed)


def source_of(run: Run) -> ListedSource:
    """The source that `run` trains on.

    Raises:
        DataError: the source is unreadable, or no training problem has what the objective needs: a response, or a
            strategy.
    """
    tasks, objective = run.tasks, run.algorithm.objective
    source = open_source(tasks.source, path=tasks.path, held_out=tasks.held_out, seed=run.seed)
    if run.algorithm.needs_responses and not source.has_responses:
        raise DataError(
            f"{tasks.path}: algorithm.objective={objective} needs responses, but no training problem has one; "
            "add the column 'response', or choose sgpo or grpo"
        )
    if objective == "sgpo" and not any(problem.strategy for problem in source.training_problems()):
        raise DataError(
            f"{tasks.path}: algorithm.objective=sgpo needs strategies, but no training problem has one; make them with "
            "sgpo-async strategies extract, or set algorithm.objective=grpo"
        )
    return source
