"""Waits whose deadline counts the time without progress."""

from __future__ import annotations

import itertools
from concurrent.futures import Future

import pytest

from sgpo_async.processes import progress
from sgpo_async.processes.progress import result_while_moving


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOOK_S", 0.001)


def test_work_that_makes_progress_may_take_longer_than_the_limit() -> None:
    future: Future[str] = Future()
    counter = itertools.count()

    def moved() -> int:
        count = next(counter)
        if count == 50:
            future.set_result("done")
        return count

    assert result_while_moving(future, moved, limit_s=0.01) == "done"


def test_work_that_makes_no_progress_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        result_while_moving(Future(), lambda: 7, limit_s=0.02)


def test_the_error_of_the_work_is_raised_also_if_it_is_a_timeout_of_its_own() -> None:
    future: Future[str] = Future()
    future.set_exception(TimeoutError("its own"))
    with pytest.raises(TimeoutError, match="its own"):
        result_while_moving(future, lambda: 0, limit_s=60)
