"""Splits problems with responses into training and validation data for SFT. Does not import torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.files import read_problems, read_split
from sgpo_async.tasks.records import Form
from sgpo_async.tasks.rows import open_rows
from sgpo_async.tasks.sources import GENERATED, open_source

FAR = 2**40  # first position of a built-in domain's supervised problems; RL never reaches it


class SftData(NamedTuple):
    """Every problem has a response; no problem's text is in both parts."""

    training: Sequence[Problem]
    validation: Sequence[Problem]
    without: int  # number of problems left out because they have no response
    held_out: int = 0  # number of problems left out because the run evaluates on them


def sft_data(run: Run) -> SftData:
    """The data that `run.sft` names, split by `run.seed`.

    Raises:
        DataError: a line is bad, or a part is empty.
    """
    sft, tasks = run.sft, run.tasks
    if tasks.source in GENERATED and not sft.path:
        source = open_source(tasks.source, path="", held_out=tasks.held_out, seed=run.seed)
        return _split([source.training(FAR + i) for i in range(sft.problems)], run)
    problems, held_out = _read(run)
    if not sft.validation:
        return _split(problems, run)._replace(held_out=len(held_out))
    validation = read_problems(sft.validation)
    seen = {problem.problem for problem in validation}
    found = _checked([p for p in problems if p.problem not in seen], validation, sft.path or tasks.path)
    return found._replace(held_out=len(held_out))


def _read(run: Run) -> tuple[list[Problem], Sequence[Problem]]:
    """The problems of `sft.path`; if RL trains on the same file, without its held-out problems, and these.

    A warm-up on the solutions of held-out problems would make the evaluation of every later run too optimistic.
    """
    path, tasks = run.sft.path or run.tasks.path, run.tasks
    if tasks.source == "file" and Path(path).resolve() == Path(tasks.path).resolve():
        rows = open_rows(path, config=tasks.dataset_config, split=tasks.split)
        split = read_split(rows, path, held_out=tasks.held_out, form=Form.of(tasks))
        return list(split.training), split.held_out
    return read_problems(path), []


def _split(problems: Sequence[Problem], run: Run) -> SftData:
    """Set aside a random `validation_share` of the distinct texts, at least one, for validation."""
    texts = list(dict.fromkeys(problem.problem for problem in problems if problem.response))
    random.Random(f"validation {run.seed}").shuffle(texts)
    aside = set(texts[: max(1, round(run.sft.validation_share * len(texts)))])
    training = [problem for problem in problems if problem.problem not in aside]
    return _checked(training, [p for p in problems if p.problem in aside], run.sft.path or run.tasks.path)


def _checked(training: Sequence[Problem], validation: Sequence[Problem], path: str) -> SftData:
    parts = [[problem for problem in part if problem.response] for part in (training, validation)]
    if not all(parts):
        raise DataError(
            f"{path}: {len(parts[0])} problems with a response to train on and {len(parts[1])} to validate with; "
            "there must be at least one of each: add the column 'response', or lower sft.validation_share"
        )
    return SftData(parts[0], parts[1], len(training) + len(validation) - len(parts[0]) - len(parts[1]))
