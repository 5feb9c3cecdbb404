"""The idle time of the trainer by cause."""

import pytest

from sgpo_async.learner import waits
from sgpo_async.learner.waits import Waits


def test_the_seconds_of_each_cause_are_added_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 20.0, 20.5, 30.0, 32.0])
    monkeypatch.setattr(waits.time, "monotonic", lambda: next(clock))
    own = Waits()
    for cause in ("batch", "batch"):
        with own.on(cause):
            pass
    with pytest.raises(ValueError), own.on("publication"):
        raise ValueError  # what fails has waited, too
    assert own.shares(4.0) == {"batch": 0.375, "publication": 0.5, "checkpoint": 0.0}
    own.begin()
    assert set(own.shares(4.0).values()) == {0.0}
