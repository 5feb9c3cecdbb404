"""What the text of rollouts shows: which completions match a pattern or quote a context, and where the divergence is.

    learner.patterns        share of the autonomous completions in which the regular expression is found: whether the
                            policy mentions a context that it does not have, or takes over the style of one
    learner.quoted_words    share of the autonomous completions with so many words in a row that a context has and the
                            plain prompt has not: of the context of their own problem, and of that of another one
    learner.token_classes   mean d_t (Eq. 3) of the distilled tokens whose whole text the regular expression matches;
                            with two divergences (pi-distill) the mean over both

Every rank counts in its own rollouts; one collective adds the counts of all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from sgpo_async.config.training import OTHER, Learner
from sgpo_async.learner.contexts import Contexts
from sgpo_async.learner.step_metrics import Distilled
from sgpo_async.wire.records import Rollout

MOST = 64  # completions that one rank decodes for a part of a batch

Phrases = set[tuple[str, ...]]


class Read(NamedTuple):
    """The phrases of a task's two prompts."""

    plain: Phrases
    context: Phrases  # of the prompt with the context


class Patterns:
    """The counts of one step on one rank."""

    def __init__(self, learner: Learner, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._patterns = {name: re.compile(pattern) for name, pattern in learner.patterns.items()}
        self._classes = {name: re.compile(pattern) for name, pattern in learner.token_classes.items()}
        self._quoted = learner.quoted_words
        self._places: dict[int, int] = {}  # the place among the classes of each token id that was met
        self._clear()

    def _clear(self) -> None:
        self._found = [0] * len(self._patterns)
        self._seen = 0
        self._quotes = {"own": [0, 0], "other": [0, 0]}  # completions that quote a context, and all with a context

    def see(self, rollouts: Sequence[Rollout], contexts: Contexts | None = None) -> None:
        """Count in the autonomous completions of these rollouts, in at most MOST of them, evenly chosen.

        `contexts` finds the prompts with a context of groups that have no guided rollout.
        """
        own = [rollout for rollout in rollouts if not rollout.guided] if self._patterns or self._quoted else []
        chosen = [own[int(place)] for place in np.linspace(0, len(own) - 1, min(len(own), MOST))]
        texts = [self._text(one.tokens[one.sampled]) for one in chosen]
        self._seen += len(texts)
        for place, pattern in enumerate(self._patterns.values()):
            self._found[place] += sum(bool(pattern.search(text)) for text in texts)
        if self._quoted:
            self._count_quotes(chosen, texts, self._read(rollouts, contexts))

    def _read(self, rollouts: Sequence[Rollout], contexts: Contexts | None) -> dict[int, Read]:
        """The phrases of the prompts of each task that has a context."""
        found = {}
        for task, members in groupby(rollouts, key=lambda rollout: rollout.task):
            group = list(members)
            plain = [rollout for rollout in group if not rollout.guided]
            prompts = [rollout.prompt for rollout in group if rollout.guided]
            if contexts and plain and not prompts:
                prompts = [one.right for one in contexts(plain).values()]
            if plain and prompts:
                found[task] = Read(*(self._phrases(self._text(prompt)) for prompt in (plain[0].prompt, prompts[0])))
        return found

    def _count_quotes(self, chosen: Sequence[Rollout], texts: Sequence[str], read: dict[int, Read]) -> None:
        """Count the completions that quote the context of their own problem, and of the next one of `read`."""
        tasks = list(read)
        following = dict(zip(tasks, [*tasks[1:], *tasks[:1]], strict=True)) if len(tasks) > 1 else {}
        for rollout, text in zip(chosen, texts, strict=True):
            said = self._phrases(text) - read[rollout.task].plain if rollout.task in read else None
            for name, task in (("own", rollout.task), ("other", following.get(rollout.task))):
                if said is not None and task is not None:
                    self._quotes[name][0] += not said.isdisjoint(read[task].context)
                    self._quotes[name][1] += 1

    def _phrases(self, text: str) -> Phrases:
        """All runs of `quoted_words` words in a row."""
        words = re.findall(r"\w+", text.lower())
        return set(zip(*(words[start:] for start in range(self._quoted)), strict=False))

    def _text(self, tokens: np.ndarray) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def reduce(self, distilled: Sequence[Distilled]) -> dict[str, Any]:
        """The metrics of the step, equal on every rank, of what every rank has distilled. A collective of all ranks."""
        kl, tokens = self._by_class(distilled)
        quotes = [count for pair in self._quotes.values() for count in pair]
        parts = ([self._seen], self._found, quotes, kl, tokens)
        counts = torch.tensor([count for part in parts for count in part], dtype=torch.float64)
        dist.all_reduce(counts)
        self._clear()
        (seen,), found, quotes, kl, tokens = (part.tolist() for part in counts.split([len(part) for part in parts]))
        return {
            "patterns": {name: count / seen for name, count in zip(self._patterns, found, strict=True) if seen},
            "quotes": {
                name: count / of for name, count, of in zip(self._quotes, quotes[::2], quotes[1::2], strict=True) if of
            },
            "kl_classes": {
                name: total / count
                for name, total, count in zip([*self._classes, OTHER], kl, tokens, strict=True)
                if count and self._classes
            },
        }

    def _by_class(self, distilled: Sequence[Distilled]) -> tuple[list[float], list[float]]:
        """The sum of d_t and the number of trained tokens of each class, and of all others."""
        size = len(self._classes) + 1
        if not self._classes or not distilled:
            return [0.0] * size, [0.0] * size
        d = torch.cat([one.d for one in distilled]).double().cpu().numpy()
        ids = np.concatenate([one.rollout.tokens for one in distilled])
        trained = ~np.isnan(d)
        places = np.array([self._place(token) for token in ids[trained].tolist()], np.int64)
        return np.bincount(places, d[trained], size).tolist(), np.bincount(places, minlength=size).tolist()

    def _place(self, token: int) -> int:
        place = self._places.get(token)
        if place is None:
            text = self._tokenizer.decode([token])
            fits = (place for place, pattern in enumerate(self._classes.values()) if pattern.fullmatch(text))
            place = self._places[token] = next(fits, len(self._classes))
        return place
