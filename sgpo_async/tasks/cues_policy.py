"""Specifies the base policy of the cues domain: its words, and what it is trained on.

The policy applies any techniques that a strategy names. Without a strategy it guesses: for every cue the most probable
technique is wrong and the true one is second. So sampling rarely gets five techniques right, and greedy decoding never
does: training must change 36 preferences, not just sharpen them. The true technique remains probable enough to be
learned: the KL divergence from a certain teacher, -ln p(true), is below 1.
"""

from __future__ import annotations

import random

from sgpo_async.tasks.cues_domain import (
    CUES,
    DIGITS,
    KEYWORDS,
    STEPS,
    TECHNIQUES,
    TRUE_TECHNIQUE,
    Exercise,
    draw_exercise,
)
from sgpo_async.tasks.word_policy import draw_context, draw_guesses, guess_distribution

VOCABULARY = (*KEYWORDS, *DIGITS, *TECHNIQUES, *CUES)


def guess_probabilities(cue: str, *, p_true: float, p_favourite: float) -> dict[str, float]:
    """Technique -> probability that the base policy guesses it without a strategy; the sum is 1.

    Probability that all five are right: p_true^5, 1.6 % of builtin:cues.
    """
    names = list(TECHNIQUES)
    true = TRUE_TECHNIQUE[cue]
    wrong = [name for name in names if name != true]
    favourite = wrong[CUES.index(cue) % len(wrong)]
    return guess_distribution(names, {true: p_true, favourite: p_favourite})


def draw_example(
    rng: random.Random, progress: float, *, contexts: bool = False, p_true: float, p_favourite: float
) -> tuple[str, str]:
    """(prompt, solution) of a training problem, with a strategy with probability 1/2, or in `contexts` of all kinds.

    The techniques of a solution are drawn at random for each problem. With a strategy they are drawn uniformly and the
    strategy names them, so the policy learns to follow strategies but not which technique a cue requires. Without one
    they are drawn from `guess_probabilities`. Problems grow from two steps to five with `progress`, from 0 to 1.
    """
    steps = rng.randint(2, min(STEPS, 2 + int(8 * progress)))
    exercise = draw_exercise(rng, steps=steps)
    if contexts:
        return _draw_in_context(rng, exercise, p_true=p_true, p_favourite=p_favourite)
    if rng.random() < 0.5:  # not by `draw_context`: builtin:cues was made with these random numbers
        techniques = tuple(rng.choices(list(TECHNIQUES), k=steps))
        prompt = f"{exercise.strategy_text(techniques)} {exercise.problem_text()}"
    else:
        techniques = _guess(rng, exercise, p_true, p_favourite)
        prompt = exercise.problem_text()
    return prompt, exercise.solution_text(techniques)


def _guess(rng: random.Random, exercise: Exercise, p_true: float, p_favourite: float) -> tuple[str, ...]:
    guesses = (guess_probabilities(cue, p_true=p_true, p_favourite=p_favourite) for cue in exercise.cues)
    return draw_guesses(rng, guesses)


def _draw_in_context(rng: random.Random, exercise: Exercise, *, p_true: float, p_favourite: float) -> tuple[str, str]:
    def uniform(one: Exercise) -> tuple[str, ...]:
        return tuple(rng.choices(list(TECHNIQUES), k=len(one.cues)))

    other = draw_exercise(rng)
    drawn = draw_context(
        rng,
        exercise,
        contexts=True,
        shown=uniform(exercise),
        guessed=_guess(rng, exercise, p_true, p_favourite),
        other=(other, uniform(other)),
    )
    return drawn.prompt, exercise.solution_text(tuple(drawn.plan))
