"""Completions of a run that are kept to be read: runs/NAME/samples.jsonl, one line per group.

    step, task, version          the step that trained on the group, and the weights that it trained
    problem, answer, strategy
    context                      what kind of text the guided prompts hold (`tasks.context`)
    alpha                        the weight of distillation of this problem
    rollouts                     of each: slot, guided, reward, correct, finish, tokens (how many), text, and the weight
                                 versions that sampled its spans: versions, ends (as in `wire.records.Rollout`),
                                 and digests, the short digest of each of these versions' weights;
                                 sibling, the slot of the rollout whose completion the teacher read as the context, if
                                 it read one;
                                 of a distilled one also kl, the divergence d_t of each token in nats (Eq. 3; null if
                                 the token is not trained), left_out, the numbers from 0 of the tokens without a part in
                                 the loss, for whatever reason, and pieces, the text that each token adds

The learner's rank 0 writes the file; the command `samples` and the report read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError
from sgpo_async.files import JsonLinesReader, JsonLinesWriter, to_json, write_whole

SAMPLES = "samples.jsonl"


class SamplesTail:
    """Follows samples.jsonl: each `poll` returns the lines that were completed since the last one.

    The file becomes shorter now and then; after that, `poll` returns all of its lines.
    """

    def __init__(self, folder: str | Path) -> None:
        self._lines = JsonLinesReader(Path(folder) / SAMPLES)

    def poll(self) -> list[dict[str, Any]]:
        """Return new complete lines, [] without the file. Raises DataError (file, line, reason) if one is invalid."""
        return [self._checked(number, values) for number, values in self._lines.poll()]

    def _checked(self, number: int, values: Any) -> dict[str, Any]:
        whole = isinstance(values, dict) and isinstance(values.get("step"), int)
        if not (whole and isinstance(values.get("rollouts"), list)):
            where = f"{self._lines.path}:{number}"
            raise DataError(f"{where}: must be an object with an integer 'step' and a list 'rollouts'; remove the line")
        return values


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Return all complete lines of samples.jsonl, [] without the file. Raises DataError for an invalid line."""
    return SamplesTail(folder).poll()


class SamplesWriter:
    """Writes samples.jsonl of one run below `folder`, never larger than `max_bytes` if it has several steps.

    The file has the steps 1, 1 + every, 1 + 2 * every, ... When it becomes too large, `every` doubles and the other
    steps are deleted. So it always covers the whole run evenly.

    `resume_from` has the same meaning as for `MetricsWriter`. Every method raises SgpoError (file, reason, remedy) if
    the disk is full or the folder is not writable.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int, resume_from: int = 0) -> None:
        self._path, self._max_bytes = Path(folder) / SAMPLES, max_bytes
        kept = [line for line in read_samples(folder) if line["step"] <= resume_from] if resume_from else []
        self.every = _distance(kept)
        self._rewrite(kept)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add the groups of one step."""
        for line in lines:
            self._lines.append(line)
        while self._path.stat().st_size > self._max_bytes:
            kept = read_samples(self._path.parent)
            if len({line["step"] for line in kept}) <= 1:
                return
            self.every *= 2
            self._lines.close()
            self._rewrite([line for line in kept if self.due(line["step"])])

    def due(self, step: int) -> bool:
        """Whether groups of this step (1, 2, ...) are kept."""
        return due(step, self.every)

    def close(self) -> None:
        """No further lines."""
        self._lines.close()

    def _rewrite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self._path, "".join(to_json(line) + "\n" for line in lines))
        self._lines = JsonLinesWriter(self._path)


def due(step: int, every: int) -> bool:
    """Whether groups of `step` are kept when those of every `every`-th step are, from step 1."""
    return (step - 1) % every == 0


def _distance(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of steps between two samples; 1 if there are no two."""
    steps = sorted({line["step"] for line in lines})
    return min((later - earlier for earlier, later in pairwise(steps)), default=1)
