"""Pass rates on held-out problems, measured by the actors while training goes on.

One round is one task per held-out problem, all served by the version asked for or a newer one. Rounds run one after
another, before training tasks wherever an actor holds a version that is new enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from sgpo_async.hub.figures import mean_of_known
from sgpo_async.hub.leases import Book
from sgpo_async.hub.work import Group
from sgpo_async.tasks.curriculum import Curriculum
from sgpo_async.wire.records import Evaluated, Lease


class Evaluation:
    """Rounds asked for, the one that runs, and results so far."""

    def __init__(self, curriculum: Curriculum, *, version: int = 0, first_attempt: int = 0) -> None:
        self.curriculum = curriculum
        self.book = Book(first_attempt=first_attempt)
        self.first_version = version  # tokens of older weights belong to another past
        self.asked: deque[int] = deque()  # versions whose round has not begun
        self.current: int | None = None  # version of the round that runs
        self.begun = 0  # rounds
        self.results: list[Evaluated] = []

    @property
    def problems(self) -> int:
        """Tasks of a round."""
        return len(self.curriculum.held_out)

    def ask(self, version: int) -> Evaluated | None:
        """The result for `version`, if it is known; otherwise its round will run."""
        done = [result for result in self.results if result.version == version]
        if not done and version != self.current and version not in self.asked:
            self.asked.append(version)
        return done[0] if done else None

    def advance(self) -> Evaluated | None:
        """End the round that is complete and return its result; begin the next one if none runs."""
        done = self.current is not None and not (self.book.waiting or self.book.running)
        result = self._end() if done else None
        if self.current is None and self.asked:
            self._begin(self.asked.popleft())
        return result

    def dispatched(self, number: int) -> bool:
        """Whether there ever was an evaluation task of this number."""
        return -self.begun * self.problems <= number < 0

    def lowest_version(self) -> int | None:
        """The lowest version that may serve the next lease; None if there is nothing to lease."""
        if not self.book.waiting:
            return None
        assert self.current is not None
        return max(self.current, self.first_version)

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Lease the next task of the round to `member`."""
        return self.book.lease(member, min_version=min_version, now=now)

    def _begin(self, version: int) -> None:
        self.current = version
        first = -1 - self.begun * self.problems
        self.begun += 1
        for number in range(first, first - self.problems, -1):
            self.book.add(self.curriculum.task(number))

    def _end(self) -> Evaluated:
        assert self.current is not None
        groups = self.book.train(list(self.book.complete))
        result = summarise(groups, version=self.current)
        self.results.append(result)
        self.current = None
        return result


def summarise(groups: Sequence[Group], *, version: int) -> Evaluated:
    """Mean pass rates over problems; `pass_guided` over those that have a strategy, 0 if none has."""
    guided = [group.pass_rate(guided=True) for group in groups]
    return Evaluated(
        version=version,
        pass_auto=mean_of_known([group.pass_rate(guided=False) for group in groups]) or 0.0,
        pass_guided=mean_of_known(guided) or 0.0,
        problems=len(groups),
    )
