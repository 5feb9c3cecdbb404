"""Contexts: what guided prompts hold, and a teacher reads, beside the problem (`tasks.context`).

    strategy          the problem's strategy
    response          its worked solution
    partial-response  the first quarter of that, in words; nothing where the solution is one word
    answer            its answer alone
    other-strategy    the strategy of a following problem, the first that is another text, for contrast
    none              nothing: the teacher's prompt is the plain one
    sibling           a correct rollout of the same group

The text of a context takes the place of the strategy in every problem of the source, so hub, actors and learner need
not know which context it is. A sibling is known only when the group is complete: `learner.contexts` looks for it, and
no rollout is guided by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from sgpo_async.config.schema import Context
from sgpo_async.tasks.base import ListedSource, Problem, longest

PART = 4  # a partial response is a quarter of the response; POPE, arXiv 2601.18779: at most that
FARTHEST = 32  # problems in which another text is looked for

Following = Callable[[int], Problem]
"""Distance >= 1 -> the problem that so many places later follows."""


class ContextSource:
    """The problems of `source`, each with the text of another context in place of its strategy."""

    def __init__(self, source: ListedSource, kind: Context) -> None:
        self._source, self._kind = source, kind
        self.verifier, self.responses = source.verifier, source.responses
        counts = {
            "other-strategy": source.strategies,
            "response": source.responses,
            "partial-response": source.responses,
            "answer": len(source.training_problems()),
        }
        self.strategies = counts.get(kind, 0)

    def training(self, position: int) -> Problem:
        """The training problem at `position`."""
        return self._in_context(
            self._source.training(position), lambda distance: self._source.training(position + distance)
        )

    def training_problems(self) -> Sequence[Problem]:
        """All training problems."""
        return _InContext(self._source.training_problems(), self._in_context)

    def longest_problems(self, count: int) -> Sequence[Problem]:
        """The training problems with the most characters, the context included."""
        return longest(self.training_problems(), count)

    def held_out(self) -> Sequence[Problem]:
        """The held-out problems."""
        return list(_InContext(self._source.held_out(), self._in_context))

    def _in_context(self, problem: Problem, following: Following) -> Problem:
        return replace(problem, strategy=_text(self._kind, problem, following))


class _InContext(Sequence[Problem]):
    """The same problems in context, each made when it is asked for."""

    def __init__(self, problems: Sequence[Problem], in_context: Callable[..., Problem]) -> None:
        self._problems, self._in_context = problems, in_context

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self._in_context(self._problems[index], lambda distance: self._problems[(index + distance) % len(self)])


def beginning(response: str) -> str:
    """The first quarter of the words, rounded up."""
    words = response.split(" ")
    return " ".join(words[: -(-len(words) // PART)])


def other_strategy(problem: Problem, following: Following) -> str | None:
    """The strategy of the first following problem that has another text; None if the nearest all have the same."""
    texts = (following(distance).strategy for distance in range(1, FARTHEST + 1))
    return next((text for text in texts if text and text != problem.strategy), None)


def _text(kind: Context, problem: Problem, following: Following) -> str | None:
    if kind == "other-strategy":
        return other_strategy(problem, following)
    if kind == "partial-response" and problem.response is not None:
        return beginning(problem.response) if " " in problem.response else None
    return {"response": problem.response, "answer": problem.answer}.get(kind)
