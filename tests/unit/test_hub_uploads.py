"""The hub keeps a weight uploader."""

from __future__ import annotations

import logging

import pytest

from sgpo_async.errors import DeadlineExceeded
from sgpo_async.hub import uploads
from sgpo_async.hub.uploads import AGAIN_S, Uploads
from sgpo_async.session.stopping import Stopping
from sgpo_async.session.uploader_process import Uploaded, UploaderDown


class ScriptedUploader:
    """A weight uploader with these events."""

    def __init__(self, *events: Uploaded | UploaderDown) -> None:
        self.events, self.stopped = list(events), False

    def poll(self) -> list[Uploaded | UploaderDown]:
        events, self.events = self.events, []
        return events

    def stop(self, deadline_s: float) -> None:
        self.stopped = True


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(uploads, "time", clock)
    return clock


def test_an_uploader_that_ends_is_replaced_after_a_while(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    started: list[ScriptedUploader] = []

    def start(store: str, folder: str) -> ScriptedUploader:
        assert (store, folder) == ("/store", "s3://bucket/run")
        started.append(ScriptedUploader(Uploaded(3, 0.5), UploaderDown("no credentials")))
        return started[-1]

    kept = Uploads("/store", "s3://bucket/run", start=start)  # type: ignore[arg-type]
    kept.poll()
    assert "no credentials; starting another one" in caplog.text
    clock.now += AGAIN_S / 2
    kept.poll()
    assert len(started) == 1, "not at once: the cause may last"
    clock.now += AGAIN_S
    kept.poll()
    assert len(started) == 2
    kept.close()
    assert all(uploader.stopped for uploader in started)


def test_an_uploader_that_cannot_be_started_is_tried_again(clock: Clock) -> None:
    failures = [OSError("too many processes")]

    def start(*_: str) -> ScriptedUploader:
        if failures:
            raise failures.pop()
        return ScriptedUploader()

    kept = Uploads("/store", "s3://bucket/run", start=start)  # type: ignore[arg-type]
    kept.poll()
    clock.now += 2 * AGAIN_S
    kept.poll()
    kept.close()
    assert not failures


class Late:
    """A process whose end does not come in time, or whose handle is wrong."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def stop(self, deadline_s: float) -> None:
        raise self.error


def test_a_process_that_ends_late_is_logged_and_another_error_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    stopping = Stopping(seconds=1.0, threads=1)
    stopping.stop(Late(DeadlineExceeded("a sender", "end after SIGKILL", 1.0)))
    stopping.close()
    assert "a sender" in caplog.text and [record.levelno for record in caplog.records] == [logging.WARNING]
    wrong = Stopping(seconds=1.0, threads=1)
    with pytest.raises(ValueError, match="a bug"):
        wrong.stop(Late(ValueError("a bug")))  # here already, if its thread was fast
        wrong.close()
