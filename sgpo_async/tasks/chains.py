"""The problem source of the chains domain; `chains_domain` defines its problems."""

from __future__ import annotations

import random

from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.chains_domain import LENGTHS, draw_story
from sgpo_async.tasks.generated import GeneratedSource


class ChainsSource(GeneratedSource):
    """Half of the problems have two sentences, the others three."""

    verifier = "chains"

    def problem(self, name: str, *, seed: int) -> Problem:
        """A random story, solved with the true meanings."""
        rng = random.Random(f"chains: {seed} {name}")
        story = draw_story(rng, length=rng.choice(LENGTHS))
        meanings = story.true_meanings
        return Problem(
            id=f"chains-{seed}-{name}",
            problem=story.problem_text(),
            answer=story.answer_text(meanings),
            strategy=story.strategy_text(meanings),
            response=story.response_text(meanings),
        )
