"""Opens the problem source of a run, or a source of a given kind."""

from __future__ import annotations

from sgpo_async.config.schema import Run, Tasks
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ListedSource
from sgpo_async.tasks.chains import ChainsSource
from sgpo_async.tasks.contexts import ContextSource
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.files import FileSource
from sgpo_async.tasks.generated import GeneratedSource
from sgpo_async.tasks.records import Form
from sgpo_async.tasks.rewards import to_text

DEFAULTS = Tasks()
GENERATED: dict[str, type[GeneratedSource]] = {"cues": CuesSource, "chains": ChainsSource}


def open_source(kind: str, *, path: str, held_out: int, seed: int, tasks: Tasks = DEFAULTS) -> ListedSource:
    """The source "cues", "chains" or "file" (at `path`), with `held_out` problems set aside for evaluation.

    Args:
        tasks: how the file's records are read, the reward, and the context that takes the strategy's place.
    """
    source: GeneratedSource | FileSource
    if kind in GENERATED:
        source = GENERATED[kind](seed=seed, held_out=held_out)
    else:
        assert kind == "file", kind
        part = (tasks.dataset_config, tasks.split)
        source = FileSource(path, held_out=held_out, seed=seed, form=Form.of(tasks), part=part)
    source.verifier = to_text(tasks.reward) or source.verifier
    return source if tasks.context == "strategy" else ContextSource(source, tasks.context)


def source_of(run: Run) -> ListedSource:
    """The source that `run` trains on.

    Raises:
        DataError: the source is unreadable, or no training problem has what the objective needs: a response, or the
            text of the context.
    """
    tasks, objective = run.tasks, run.algorithm.objective
    source = open_source(tasks.source, path=tasks.path, held_out=tasks.held_out, seed=run.seed, tasks=tasks)
    if run.algorithm.needs_responses and not source.responses:
        raise DataError(
            f"{tasks.path}: algorithm.objective={objective} needs responses, but no training problem has one; "
            "add the column 'response', or choose sgpo or grpo"
        )
    if run.needs_strategies and not source.strategies:
        what = {"strategy": "strategies", "other-strategy": "strategies"}.get(tasks.context, "responses")
        remedy = "make them with sgpo-async strategies extract" if what == "strategies" else "add the column 'response'"
        raise DataError(
            f"{tasks.path}: algorithm.objective={objective} needs {what}, but no training problem has one; {remedy}, "
            "or set algorithm.objective=grpo"
        )
    return source
