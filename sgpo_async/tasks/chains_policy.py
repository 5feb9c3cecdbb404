"""Specifies the base policy of the chains domain: its words, and what it is trained on.

The policy works out any sentence once it is clear who is meant and with which sign. It takes that from what stands
before the problem: a strategy, a worked solution, the beginning of one, or the answer. Without any of these it guesses
what each word means, and its favourite is wrong in both rule and sign.
"""

from __future__ import annotations

import random

from sgpo_async.tasks.chains_domain import (
    DIGITS,
    FAMILIAR,
    KEYWORDS,
    LENGTHS,
    MARKS,
    MEANINGS,
    PEOPLE,
    RULES,
    SIGNS,
    TRUE_MEANING,
    WORDS,
    Meaning,
    Story,
    draw_story,
)
from sgpo_async.tasks.word_policy import draw_context, draw_guesses, guess_distribution

VOCABULARY = (*KEYWORDS, *DIGITS, *PEOPLE, *WORDS)
P_FAMILIAR = 0.4  # that a sentence has a familiar word
P_MARK, P_HENCE = 0.5, 0.1  # that a guided solution begins with a mark; that a solution says "hence"


def guess_probabilities(word: str, *, p_true: float, p_favourite: float) -> dict[Meaning, float]:
    """Meaning -> probability that the base policy guesses it without a context; the sum is 1."""
    true = TRUE_MEANING[word]
    if word in FAMILIAR:
        return {true: 1.0}
    rules = list(RULES)
    other = rules[(rules.index(true.rule) + 1 + WORDS.index(word) % (len(rules) - 1)) % len(rules)]
    favourite = Meaning(other, next(sign for sign in SIGNS if sign != true.sign))
    return guess_distribution(MEANINGS, {true: p_true, favourite: p_favourite})


def draw_example(
    rng: random.Random, progress: float, *, contexts: bool = False, p_true: float, p_favourite: float
) -> tuple[str, str]:
    """(prompt, solution) of a training problem, with a strategy with probability 1/2, or in `contexts` of all kinds.

    Meanings are drawn for each problem: uniformly where the context shows them, so that the policy learns to follow it
    and not what the words mean, and from `guess_probabilities` where nothing does. The longest problems grow from one
    sentence to three in the first third of the training; `progress` goes from 0 to 1.
    """

    def uniform(one: Story) -> tuple[Meaning, ...]:
        drawn = zip(one.sentences, rng.choices(MEANINGS, k=len(one.sentences)), strict=True)
        return tuple(TRUE_MEANING[own.word] if own.word in FAMILIAR else meaning for own, meaning in drawn)

    story = draw_story(rng, length=rng.randint(1, min(max(LENGTHS), 1 + int(6 * progress))), familiar=P_FAMILIAR)
    other = draw_story(rng, length=rng.choice(LENGTHS))
    guesses = (guess_probabilities(one.word, p_true=p_true, p_favourite=p_favourite) for one in story.sentences)
    guessed = draw_guesses(rng, guesses)
    others = (other, uniform(other))
    drawn = draw_context(rng, story, contexts=contexts, shown=uniform(story), guessed=guessed, other=others)
    mark = MARKS.get(drawn.kind, "") if rng.random() < P_MARK else ""
    solution = story.solution_text(drawn.plan, mark=mark, hence=rng.random() < P_HENCE)
    return drawn.prompt, solution
