"""Keep some groups of the batches to be read: runs/NAME/samples.jsonl (`metrics.samples` has its format).

    every rank: the groups with the smallest draws of its shard,      ── gather ──▶ rank 0: the smallest of all ─▶ file
                and the divergences of the targets that it has trained

A draw is a hash of the task's number, so the choice favours no group: not short ones, not solved ones, not those of one
rank. What is written was computed by the step; nothing is computed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.learner.step_metrics import StepMetrics
from sgpo_async.metrics.samples import SamplesWriter, due
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import TaskSampler, derived_seed
from sgpo_async.weights.short_digest import digest_text
from sgpo_async.wire.records import Rollout, Shard

log = logging.getLogger(__name__)

DIGITS = 4  # decimal places of a divergence


class TokenKl(NamedTuple):
    """Of the tokens of a distilled rollout, as in `step_metrics.Distilled`."""

    d: np.ndarray  # d_t [T], NaN for tokens that are not trained
    left_out: np.ndarray  # [T] bool: tokens without a part in the loss


Divergences = dict[tuple[int, int], TokenKl]
"""By task and slot."""


@dataclass(frozen=True)
class KeptGroup:
    """One group and its weight."""

    draw: int  # the groups with the smallest draws are kept
    rollouts: tuple[Rollout, ...]
    alpha: float
    siblings: Mapping[int, int]  # by slot: the slot of the sibling whose completion the teacher read as the context


class Samples:
    """Chooses the samples of one rank; on rank 0 it has the writer."""

    def __init__(self, run: Run, lines: SampleLines | None) -> None:
        self._run, self._lines = run, lines
        self._every = 1

    @classmethod
    def start(cls, run: Run, *, resume_from: int) -> Samples:
        """Open the file on rank 0."""
        lines = SampleLines(run, resume_from=resume_from) if dist.get_rank() == 0 else None
        return cls(run, lines)

    def keep(self, parts: Sequence[Shard], statistics: StepMetrics | None) -> None:
        """Write samples of the step that has just trained on these shards, if they are due. A collective of all ranks.

        Args:
            parts: this rank's share of each part of the batch.
            statistics: of the step.
        """
        number, step = self._run.learner.samples, parts[0].step + 1
        if not number or not due(step, self._every):
            return
        self._every = self._agree()
        if not due(step, self._every):
            return
        assert statistics is not None
        own = chosen(parts, statistics, number, seed=self._run.seed)
        gathered: list[tuple[list[KeptGroup], Divergences]] | None = None
        if self._lines:
            gathered = [([], {}) for _ in range(dist.get_world_size())]
        dist.gather_object(own, gathered)
        if self._lines and gathered:
            groups = sorted((group for part, _ in gathered for group in part), key=lambda group: group.draw)
            kl = {key: d for _, part in gathered for key, d in part.items()}
            self._lines.write(step, parts[0].version, groups[:number], kl)

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()

    def _agree(self) -> int:
        """Return how many steps there are between two samples; only rank 0 knows how large the file is."""
        every = [self._lines.every if self._lines else 0]
        dist.broadcast_object_list(every)
        return every[0]


def chosen(
    parts: Sequence[Shard], statistics: StepMetrics, number: int, *, seed: int
) -> tuple[list[KeptGroup], Divergences]:
    """Return the `number` groups of these shards with the smallest draws, and as many tasks' divergences.

    The divergences are of targets that this rank has trained, which may belong to groups of other shards; of two
    divergences of a rollout (pi-distill) it is the last. A task that is among the `number` smallest draws of all ranks
    is so on this rank, too.
    """
    rollouts = [rollout for shard in parts for rollout in shard.rollouts]
    groups = [(task, tuple(own)) for task, own in groupby(rollouts, key=lambda rollout: rollout.task)]
    kept = [
        KeptGroup(_draw(seed, task), rollouts, metrics["alpha"], _siblings(task, statistics))
        for (task, rollouts), metrics in zip(groups, statistics.problems, strict=True)
    ]
    tasks = sorted({own.rollout.task for own in statistics.distilled}, key=lambda task: _draw(seed, task))[:number]
    taught = [own for own in statistics.distilled if own.rollout.task in tasks]
    kl = {
        (own.rollout.task, own.rollout.slot): TokenKl(own.d.float().cpu().numpy(), own.left_out.cpu().numpy())
        for own in taught
    }
    return sorted(kept, key=lambda group: group.draw)[:number], kl


def _siblings(task: int, statistics: StepMetrics) -> dict[int, int]:
    return {slot: sibling for (other, slot), sibling in statistics.siblings.items() if other == task}


def _draw(seed: int, task: int) -> int:
    return derived_seed(seed, "samples", task)


class SampleLines:
    """Turns groups into lines of samples.jsonl and writes them. `every` is the present distance of the steps."""

    def __init__(self, run: Run, *, resume_from: int) -> None:
        limit = run.learner.samples_mb << 20
        self._writer = SamplesWriter(run.folder, max_bytes=limit, resume_from=resume_from)
        self._tokenizer = load_tokenizer(model_folder(run.model.path))
        self._tasks = _tasks(run) if run.learner.samples else None
        self._context = run.tasks.context

    @property
    def every(self) -> int:
        """The number of steps between two samples."""
        return self._writer.every

    def write(self, step: int, version: int, groups: Sequence[KeptGroup], kl: Divergences) -> None:
        """Write the groups of one step. Raises SgpoError if the file cannot be written."""
        self._writer.append([self._line(step, version, group, kl) for group in groups])

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _line(self, step: int, version: int, group: KeptGroup, kl: Divergences) -> dict[str, Any]:
        task = group.rollouts[0].task
        problem = self._tasks.task(task).problem if self._tasks else None
        return {
            "step": step,
            "task": task,
            "version": version,
            "problem": problem.problem if problem else self._text(group.rollouts[0].prompt),
            "answer": problem.answer if problem else None,
            "strategy": problem.strategy if problem else None,
            "context": self._context,
            "alpha": group.alpha,
            "rollouts": [
                self._rollout(rollout, kl.get((task, rollout.slot)), group.siblings.get(rollout.slot))
                for rollout in group.rollouts
            ],
        }

    def _rollout(self, rollout: Rollout, kl: TokenKl | None, sibling: int | None) -> dict[str, Any]:
        line = {
            "slot": rollout.slot,
            "guided": rollout.guided,
            "reward": rollout.reward,
            "correct": rollout.correct,
            "finish": rollout.finish,
            "tokens": len(rollout.tokens),
            "versions": rollout.versions.tolist(),
            "digests": [digest_text(digest) for digest in rollout.digests.tolist()],
            "ends": rollout.ends.tolist(),
            "text": self._text(rollout.tokens),
        }
        line |= {} if sibling is None else {"sibling": sibling}
        if kl is None:
            return line
        values = [None if math.isnan(value) else round(value, DIGITS) for value in kl.d.tolist()]
        left_out = np.flatnonzero(kl.left_out).tolist()
        return line | {"kl": values, "left_out": left_out, "pieces": pieces(self._tokenizer, rollout.tokens)}

    def _text(self, tokens: np.ndarray) -> str:
        return decode(self._tokenizer, tokens)


def _tasks(run: Run) -> TaskSampler | None:
    """Return the problems of the run; None, with a warning, if this machine cannot read them as the hub does."""
    try:
        return TaskSampler(run, source_of(run))
    except DataError as error:
        log.warning("samples.jsonl will have prompts in place of problems, which the learner cannot read: %s", error)
        return None


def decode(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Return the text of tokens, with special tokens, as the model sees it."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def pieces(tokenizer: Any, tokens: np.ndarray) -> list[str]:
    """Return the text that each token adds; joined, they are the whole text.

    A token that ends within a character adds nothing: the character belongs to the token that completes it.
    """
    ids, found = tokens.tolist(), []
    start = read = 0  # decode from the last two pieces on: some tokenizers drop a space at the beginning
    for end in range(1, len(ids) + 1):
        before, after = decode(tokenizer, ids[start:read]), decode(tokenizer, ids[start:end])
        if after.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(after[len(before) :])
        start, read = read, end
    return found
