"""Splits a user's problems into sets for warm-up, its validation and RL. Pure functions for `sgpo-async data prepare`.

    problems ──▶ duplicates ──▶ near-duplicates ──▶ contamination ──▶ split ──▶ sft, sft-validation, rl
                     └───────────────┴──────────────────┴──▶ removed, each with its reason

The result does not depend on the order of the problems: content decides which duplicate is kept, and the random order
is a digest of seed and text. So two files with the same lines give the same sets, and a new problem moves few others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.config.schema import require
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.overlap import Contained, Nearest, Words, normalised, words_of

Reason = Literal["duplicate", "duplicate with another answer", "near-duplicate", "contamination"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is removed and how the rest is split. The shares are the paper's; the other defaults are common values."""

    seed: int = 0
    sft_share: float = 1 / 3  # share of all kept problems; these need a response
    validation_share: float = 0.1  # share of the warm-up problems
    duplicate_words: int = 5  # length of the n-grams that near-duplicates are compared by
    duplicate_overlap: float = 0.8  # near-duplicates from this Jaccard similarity on; 1: the same n-grams
    contamination_words: int = 13  # length of the n-grams that evaluation sets are compared by
    contamination_overlap: float = 0.0  # contaminated above this overlap; 0: any common n-gram

    def __post_init__(self) -> None:
        require(0 <= self.sft_share < 1, "--sft-share", "must be in [0, 1)", self.sft_share)
        require(0 < self.validation_share < 1, "--validation-share", "must be in (0, 1)", self.validation_share)
        require(0 < self.duplicate_overlap <= 1, "--duplicate-overlap", "must be in (0, 1]", self.duplicate_overlap)
        require(self.duplicate_words >= 1, "--duplicate-words", "must be >= 1", self.duplicate_words)
        require(self.contamination_words >= 1, "--contamination-words", "must be >= 1", self.contamination_words)
        require(
            0 <= self.contamination_overlap < 1,
            "--contamination-overlap",
            "must be in [0, 1)",
            self.contamination_overlap,
        )


@dataclass(frozen=True, kw_only=True)
class Removed:
    """A problem that was removed from all sets."""

    problem: Problem
    reason: Reason
    like: Problem  # the matching problem: one that this rule kept (a later rule may remove it) or of an evaluation set
    evaluation: str = ""  # the name of the evaluation set
    overlap: float = 1.0
    shared: str = ""  # an n-gram that both texts have


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The disjoint sets and the removed problems; together they are all problems that were read."""

    sft: Sequence[Problem]
    validation: Sequence[Problem]
    rl: Sequence[Problem]
    removed: Sequence[Removed] = field(default=())

    @property
    def sets(self) -> dict[str, Sequence[Problem]]:
        """The sets that are not empty, by the names of their files."""
        named = {"sft": self.sft, "sft-validation": self.validation, "rl": self.rl}
        return {name: problems for name, problems in named.items() if problems}


def prepare(problems: Sequence[Problem], evaluation: Sequence[tuple[str, Problem]], rules: Rules) -> Prepared:
    """Clean and split. `evaluation`: (name of the set, problem). Raises DataError if a set is empty."""
    kept, same = without_duplicates(problems)
    kept, near = without_near_duplicates(kept, rules)
    kept, known = without_contamination(kept, evaluation, rules)
    if not kept:
        raise DataError(
            f"of {len(problems)} problems none is left: {len(same) + len(near)} repeat others, {len(known)} are of "
            "--benchmark; give more problems"
        )
    sft, validation, rl = split(kept, rules)
    return Prepared(sft=sft, validation=validation, rl=rl, removed=[*same, *near, *known])


def without_duplicates(problems: Sequence[Problem]) -> tuple[list[Problem], list[Removed]]:
    """One problem of each normalised text, in an order that follows from their content."""
    kept: dict[str, Problem] = {}
    removed = []
    for problem in sorted(problems, key=_preference):
        first = kept.setdefault(normalised(problem.problem), problem)
        if first is not problem:
            same = normalised(first.answer) == normalised(problem.answer)
            reason: Reason = "duplicate" if same else "duplicate with another answer"
            removed.append(Removed(problem=problem, reason=reason, like=first))
    return list(kept.values()), removed


def without_near_duplicates(problems: Sequence[Problem], rules: Rules) -> tuple[list[Problem], list[Removed]]:
    """Remove problems that nearly equal an earlier kept problem and have the same numbers and the same answer.

    A problem with other numbers or operators is a different problem, even if few words differ.
    """
    words = [words_of(problem.problem) for problem in problems]
    facts = [(_numbers(found), normalised(one.answer)) for found, one in zip(words, problems, strict=True)]
    nearest = Nearest(words, size=rules.duplicate_words, least=rules.duplicate_overlap)
    kept, removed = [], []
    for index, problem in enumerate(problems):
        match = next((one for one in nearest.matches(index) if facts[one.index] == facts[index]), None)
        if match is None:
            nearest.keep(index)
            kept.append(problem)
        else:
            like, overlap = problems[match.index], match.overlap
            removed.append(
                Removed(problem=problem, reason="near-duplicate", like=like, overlap=overlap, shared=match.shared)
            )
    return kept, removed


def without_contamination(
    problems: Sequence[Problem], evaluation: Sequence[tuple[str, Problem]], rules: Rules
) -> tuple[list[Problem], list[Removed]]:
    """Remove problems that share n-grams with a problem of an evaluation set."""
    contained = Contained([words_of(one.problem) for _, one in evaluation], size=rules.contamination_words)
    kept, removed = [], []
    for problem in problems:
        match = contained.best(words_of(problem.problem))
        if match is None or match.overlap <= rules.contamination_overlap:
            kept.append(problem)
            continue
        name, like = evaluation[match.index]
        removed.append(
            Removed(
                problem=problem,
                reason="contamination",
                like=like,
                evaluation=name,
                overlap=match.overlap,
                shared=match.shared,
            )
        )
    return kept, removed


def split(problems: Sequence[Problem], rules: Rules) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Split into warm-up, its validation, and RL, each in its own random order. Raises DataError if one is empty.

    Warm-up problems are drawn from those with a response. With a share of 0 there is no warm-up.
    """
    answered = sorted((one for one in problems if one.response), key=_chance(rules.seed, "sft"))
    count = round(rules.sft_share * len(problems))
    if count > len(answered):
        raise DataError(
            f"--sft-share {rules.sft_share:.3g}: {count} of {len(problems)} problems are for the warm-up, but only "
            f"{len(answered)} have a response; add responses, or lower it to {_floor(len(answered), len(problems))}"
        )
    if rules.sft_share and count < 2:
        raise DataError(
            f"--sft-share {rules.sft_share:.3g}: of {len(problems)} problems it leaves {count} for the warm-up, whose "
            "validation needs one more; give more problems, or --sft-share 0 for no warm-up"
        )
    warm_up = sorted(answered[:count], key=_chance(rules.seed, "validation"))
    held = min(max(1, round(rules.validation_share * count)), count - 1) if count else 0
    chosen = {id(one) for one in warm_up}
    rl = sorted((one for one in problems if id(one) not in chosen), key=_chance(rules.seed, "rl"))
    if not rl:
        raise DataError(f"{len(problems)} problems are left, {count} for the warm-up: none for RL; give more problems")
    return warm_up[held:], warm_up[:held], rl


def _preference(problem: Problem) -> tuple[object, ...]:
    """Sort key: the first of several duplicates is kept, preferably one with a response and a strategy."""
    absent = (problem.response is None) + (problem.strategy is None)
    texts = (problem.response or "", problem.strategy or "", problem.problem, problem.answer)
    return absent, problem.response is None, texts


def _chance(seed: int, purpose: str) -> Callable[[Problem], bytes]:
    """A sort key for a random order that depends only on seed, purpose and text."""
    return lambda one: hashlib.sha256(f"{seed} {purpose} {normalised(one.problem)}".encode()).digest()


def _numbers(words: Words) -> tuple[str, ...]:
    """The words with digits or operators."""
    return tuple(sorted(word for word in words if any(letter.isdigit() for letter in word) or not word.isalpha()))


def _floor(part: int, whole: int) -> str:
    return f"{int(1000 * part / whole) / 1000:g}"
