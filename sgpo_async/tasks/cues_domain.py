"""The cues domain: each cue word requires one technique, which changes a pair of digits.

A problem gives five amounts with cues and a start state, and asks for the state after each step:

    problem 3 amber 1 birch 4 cedar 2 delta 1 ember from 4 7
    solution 3 amber raise 4 0 1 birch swap 9 5 ...          (without the word "solution")

The problem does not say which technique a cue requires; the policy must learn these 36 facts. A strategy names the
technique of each cue in order. It contains no digit, so it reveals neither an amount nor a state:

    strategy amber raise birch swap cedar lower delta both ember raise

One word is one token. Each amount is next to its cue, and the start state ends the prompt, so every operand of a
solution step is at a constant distance from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

State = tuple[int, int]

STEPS = 5
AMOUNTS = (1, 2, 3, 4)
TECHNIQUES: Mapping[str, Callable[[int, int, int], State]] = {
    "raise": lambda x, y, k: (x, (y + k) % 10),
    "lower": lambda x, y, k: (x, (y - k) % 10),
    "both": lambda x, y, k: ((x + k) % 10, (y + k) % 10),
    "swap": lambda x, y, k: (9 - y, (x + k) % 10),
}
_CUE_WORDS = """
    amber birch cedar delta ember frost grove harbor island jasper kettle lantern
    meadow nickel orchid pebble quartz river saddle timber umbra velvet willow yarrow
    zephyr anchor basalt canyon dune estuary falcon glacier heron indigo juniper kelp
"""
CUES = tuple(_CUE_WORDS.split())
KEYWORDS = ("strategy", "problem", "from")
DIGITS = tuple("0123456789")


def _true_techniques() -> dict[str, str]:
    shuffled = random.Random("cues: techniques").sample(CUES, len(CUES))
    names = tuple(TECHNIQUES)
    return {cue: names[i % len(names)] for i, cue in enumerate(shuffled)}


def _novel_pairs() -> frozenset[tuple[str, str]]:
    pairs = [(a, b) for a in CUES for b in CUES if a != b]
    return frozenset(random.Random("cues: novel pairs").sample(pairs, len(pairs) // 5))


TRUE_TECHNIQUE: Mapping[str, str] = _true_techniques()
"""The technique that each cue requires; every technique has nine cues."""
NOVEL_PAIRS = _novel_pairs()
"""Ordered pairs of neighbouring cues that occur only in held-out problems: a fifth of all pairs."""


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """The content of one problem: amounts, the same number of distinct cues, and the start state."""

    decided_after: ClassVar[int] = 3  # words of a solution, which tell the first technique
    amounts: tuple[int, ...]
    cues: tuple[str, ...]
    start: State

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """The ordered pairs of neighbouring cues."""
        return set(pairwise(self.cues))

    @property
    def true_techniques(self) -> tuple[str, ...]:
        """What the cues require."""
        return tuple(TRUE_TECHNIQUE[cue] for cue in self.cues)

    def problem_text(self) -> str:
        """Each amount with its cue, and the start state."""
        steps = " ".join(f"{k} {cue}" for k, cue in zip(self.amounts, self.cues, strict=True))
        return f"problem {steps} from {self.start[0]} {self.start[1]}"

    def strategy_text(self, techniques: tuple[str, ...]) -> str:
        """Each cue with its technique."""
        return "strategy " + " ".join(f"{c} {t}" for c, t in zip(self.cues, techniques, strict=True))

    def states(self, techniques: tuple[str, ...]) -> list[State]:
        """The state after each step if the steps use `techniques`."""
        states, state = [], self.start
        for amount, technique in zip(self.amounts, techniques, strict=True):
            state = TECHNIQUES[technique](*state, amount)
            states.append(state)
        return states

    def solution_text(self, techniques: tuple[str, ...]) -> str:
        """Each step with its technique and the state after it."""
        steps = zip(self.amounts, self.cues, techniques, self.states(techniques), strict=True)
        return " ".join(f"{k} {cue} {technique} {x} {y}" for k, cue, technique, (x, y) in steps)

    response_text = solution_text  # a worked solution has no style of its own

    def answer_text(self, techniques: tuple[str, ...]) -> str:
        """The states, `x y` after each step; the verifier compares with those of the true techniques."""
        return " ".join(f"{x} {y}" for x, y in self.states(techniques))


def draw_exercise(rng: random.Random, *, steps: int = STEPS, novel: bool = False) -> Exercise:
    """A random exercise without novel pairs, or with at least one if `novel`."""
    while True:
        exercise = Exercise(
            amounts=tuple(rng.choices(AMOUNTS, k=steps)),
            cues=tuple(rng.sample(CUES, steps)),
            start=(rng.randrange(10), rng.randrange(10)),
        )
        if bool(exercise.pairs & NOVEL_PAIRS) == novel:
            return exercise


def is_correct(answer: str, completion: str) -> bool:
    """Whether `completion` is five steps `amount cue technique x y` and nothing else, every state right.

    The completion is decoded without special tokens. Only the states are compared; amount, cue and technique need only
    be valid words of their kind. All states must be right, because the last one alone is right by chance in a few
    percent of all cases.
    """
    words = completion.split(" ")
    if len(words) != 5 * STEPS:
        return False
    steps = [words[i : i + 5] for i in range(0, len(words), 5)]
    well_formed = all(k in DIGITS and cue in CUES and technique in TECHNIQUES for k, cue, technique, _, _ in steps)
    return well_formed and " ".join(f"{x} {y}" for *_, x, y in steps) == answer
