"""What the text of rollouts shows: which completions match a pattern, and which tokens the divergence is in.

    learner.patterns        share of the autonomous completions in which the regular expression is found: whether the
                            policy mentions a context that it does not have, or takes over the style of one
    learner.token_classes   mean d_t (Eq. 3) of the distilled tokens whose whole text the regular expression matches;
                            with two divergences (pi-distill) the mean over both

Every rank counts in its own rollouts; one collective adds the counts of all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sgpo_async.config.training import OTHER, Learner
from sgpo_async.learner.step_metrics import Distilled
from sgpo_async.wire.records import Rollout

MOST = 64  # completions that one rank decodes for a part of a batch


class Patterns:
    """The counts of one step on one rank."""

    def __init__(self, learner: Learner, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._patterns = {name: re.compile(pattern) for name, pattern in learner.patterns.items()}
        self._classes = {name: re.compile(pattern) for name, pattern in learner.token_classes.items()}
        self._places: dict[int, int] = {}  # the place among the classes of each token id that was met
        self._clear()

    def _clear(self) -> None:
        self._found = [0] * len(self._patterns)
        self._seen = 0

    def see(self, rollouts: Sequence[Rollout]) -> None:
        """Count matches in the autonomous completions of these rollouts, in at most MOST of them, evenly chosen."""
        own = [rollout for rollout in rollouts if not rollout.guided] if self._patterns else []
        chosen = [own[int(place)] for place in np.linspace(0, len(own) - 1, min(len(own), MOST))]
        texts = [self._tokenizer.decode(one.tokens[one.sampled], skip_special_tokens=True) for one in chosen]
        self._seen += len(texts)
        for place, pattern in enumerate(self._patterns.values()):
            self._found[place] += sum(bool(pattern.search(text)) for text in texts)

    def reduce(self, distilled: Sequence[Distilled]) -> dict[str, Any]:
        """The metrics of the step, equal on every rank, of what every rank has distilled. A collective of all ranks."""
        kl, tokens = self._by_class(distilled)
        counts = torch.tensor([self._seen, *self._found, *kl, *tokens], dtype=torch.float64)
        dist.all_reduce(counts)
        self._clear()
        sizes = (1, len(self._patterns), len(kl), len(tokens))
        (seen,), found, kl, tokens = (part.tolist() for part in counts.split(sizes))
        return {
            "patterns": {name: count / seen for name, count in zip(self._patterns, found, strict=True) if seen},
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
