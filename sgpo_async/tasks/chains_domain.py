"""The chains domain: short stories in which each amount follows from one of two earlier ones.

A problem gives the amounts of two people and then two or three sentences. Each sentence adds a person, whose amount is
that of one of two people before, plus or minus a number, modulo 10. It asks for the last two amounts:

    story ann 3 bob 8 ; cat near ann bob 2 ; dan under cat ann 4 ; eve past bob dan 1 ; ask dan eve

The word after the person (near, under, past) says which of the two, and plus or minus: "near" may mean the richer one,
and minus. The base policy knows eight such words, one of each meaning; training must teach it the other sixteen, which
are those of the problems. Solutions repeat the word and never say what it means, only what follows from it:

    cat near ann 3 bob 8 bob minus 2 6 dan under cat 6 ann 3 ann plus 4 7 eve past bob 8 dan 7 bob plus 1 9 answer 7 9

So what has to be learned is a rule that looks at amounts which the completion itself has computed. A strategy has less
than the rule: person and sign of each step of this one problem, and no number.

    plan cat bob minus dan ann plus eve bob plus

Only the answer is judged, so a wrong way may lead to a right one. Two things are there to be measured
(`learner.patterns`). The base policy often begins a completion with the word of its context, `planned`, `shown` or
`known`, as language models do that refer to a hint: without a context that is leakage. And worked solutions say `hence`
before the answer, which the base policy rarely does: a change of style.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, NamedTuple

LENGTHS = (2, 3)  # sentences of a problem
AMOUNTS = (1, 2, 3, 4)
PEOPLE = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ivy", "jon")
_WORDS = """
    after amid among atop before behind below beside beyond by despite during
    except inside like near onto opposite outside past round toward under within
"""
WORDS = tuple(_WORDS.split())
RULES: Mapping[str, Callable[[int, int], bool]] = {
    "first": lambda _x, _y: True,
    "second": lambda _x, _y: False,
    "richer": lambda x, y: x >= y,
    "poorer": lambda x, y: x <= y,
}
"""Whether the first of two people with amounts x and y is meant; the first, if both have the same."""
SIGNS = {"plus": 1, "minus": -1}
MARKS = {
    "strategy": "planned",
    "other-strategy": "planned",
    "response": "shown",
    "partial-response": "shown",
    "answer": "known",
}
"""With which word the base policy may begin a completion, by what its prompt holds beside the problem."""
HENCE, ANSWER = "hence", "answer"
KEYWORDS = ("story", ";", "ask", "plan", ANSWER, HENCE, *dict.fromkeys(MARKS.values()), *SIGNS)
DIGITS = tuple("0123456789")


class Meaning(NamedTuple):
    """What a word says."""

    rule: str  # of RULES
    sign: str


MEANINGS = tuple(Meaning(rule, sign) for rule, sign in product(RULES, SIGNS))


def _true_meanings() -> dict[str, Meaning]:
    shuffled = random.Random("chains: meanings").sample(WORDS, len(WORDS))
    return {word: MEANINGS[i % len(MEANINGS)] for i, word in enumerate(shuffled)}


TRUE_MEANING: Mapping[str, Meaning] = _true_meanings()
"""What each word means; every meaning has three words."""
FAMILIAR = tuple(next(word for word in WORDS if TRUE_MEANING[word] == meaning) for meaning in MEANINGS)
"""The words that the base policy knows, one of each meaning. No problem has them."""
UNFAMILIAR = tuple(word for word in WORDS if word not in FAMILIAR)


class Sentence(NamedTuple):
    """`person` has as much as one of `others`, plus or minus `amount`."""

    person: str
    word: str
    others: tuple[str, str]
    amount: int


class Step(NamedTuple):
    """One sentence, worked out."""

    sentence: Sentence
    had: tuple[int, int]  # amounts of the two others
    meant: str  # one of them
    sign: str
    result: int


@dataclass(frozen=True, kw_only=True)
class Story:
    """The content of one problem."""

    decided_after: ClassVar[int] = 8  # words of a solution, which tell the first step's person and sign
    known: dict[str, int]  # amounts of the first two people
    sentences: tuple[Sentence, ...]

    @property
    def true_meanings(self) -> tuple[Meaning, ...]:
        """What the words of the sentences mean."""
        return tuple(TRUE_MEANING[sentence.word] for sentence in self.sentences)

    def steps(self, meanings: Sequence[Meaning]) -> list[Step]:
        """The sentences, worked out with these meanings."""
        amounts, steps = dict(self.known), []
        for sentence, meaning in zip(self.sentences, meanings, strict=True):
            x, y = (amounts[other] for other in sentence.others)
            first = RULES[meaning.rule](x, y)
            result = ((x if first else y) + SIGNS[meaning.sign] * sentence.amount) % 10
            amounts[sentence.person] = result
            steps.append(Step(sentence, (x, y), sentence.others[not first], meaning.sign, result))
        return steps

    def problem_text(self) -> str:
        """The problem."""
        known = " ".join(f"{person} {amount}" for person, amount in self.known.items())
        told = " ; ".join(f"{who} {word} {one} {other} {k}" for who, word, (one, other), k in self.sentences)
        return f"story {known} ; {told} ; ask {' '.join(sentence.person for sentence in self.sentences[-2:])}"

    def strategy_text(self, meanings: Sequence[Meaning]) -> str:
        """Whom each step starts from, and its sign."""
        return "plan " + " ".join(f"{step.sentence.person} {step.meant} {step.sign}" for step in self.steps(meanings))

    def solution_text(self, meanings: Sequence[Meaning], *, mark: str = "", hence: bool = False) -> str:
        """A solution with these meanings, which begins with `mark`."""
        words = [mark] if mark else []
        for (who, word, (one, other), k), (x, y), meant, sign, result in self.steps(meanings):
            words += [who, word, one, str(x), other, str(y), meant, sign, str(k), str(result)]
        return " ".join([*words, *[HENCE] * hence, ANSWER, self.answer_text(meanings)])

    def response_text(self, meanings: Sequence[Meaning]) -> str:
        """The worked solution with these meanings."""
        return self.solution_text(meanings, hence=True)

    def answer_text(self, meanings: Sequence[Meaning]) -> str:
        """The last two amounts."""
        return " ".join(str(step.result) for step in self.steps(meanings)[-2:])


def draw_story(rng: random.Random, *, length: int, familiar: float = 0.0) -> Story:
    """A random story of `length` sentences, each of which has one of FAMILIAR with probability `familiar`."""
    people = rng.sample(PEOPLE, 2 + length)
    sentences = []
    for number in range(length):
        one, other = rng.sample(people[: 2 + number], 2)
        words = FAMILIAR if rng.random() < familiar else UNFAMILIAR
        sentences.append(Sentence(people[2 + number], rng.choice(words), (one, other), rng.choice(AMOUNTS)))
    return Story(known={person: rng.randrange(10) for person in people[:2]}, sentences=tuple(sentences))


def is_correct(answer: str, completion: str) -> bool:
    """Whether `completion` ends with `answer x y` and these are the right amounts, however it got there."""
    return completion.split(" ")[-3:] == [ANSWER, *answer.split(" ")]
