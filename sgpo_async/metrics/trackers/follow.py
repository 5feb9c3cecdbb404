"""Read the files of a run as they grow, and write what is new to one tracker; after a failure, try again.

Nothing is kept here that the files do not have: whenever the tracker is opened, they are read from their beginning, and
what the tracker has already is left out.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sgpo_async.metrics.names import histograms, scalars
from sgpo_async.metrics.reader import MetricsTail, read_summary
from sgpo_async.metrics.samples import SamplesTail
from sgpo_async.metrics.trackers.base import (
    About,
    State,
    Tracker,
    flattened,
    open_tracker,
    redacted,
    state_file,
    without_secrets,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # after a failure; it doubles with each
SHOWN = 2  # rollouts of a kind (without, with the strategy) in a table of samples
CHARS = 2000  # of a text in it
REASON = 300  # characters of a failure
TICK_S = 0.1  # between two attempts to become the only writer
# MLflow otherwise refuses folders and asks for git; W&B and MLflow would send reports about themselves.
ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "WANDB_ERROR_REPORTING": "false",
}


class Follower:
    """Brings the run in `folder` to a tracker of the kind `kind`; `open_it` opens it."""

    def __init__(self, kind: str, folder: Path, open_it: Callable[[str, About], Tracker] = open_tracker) -> None:
        self.kind, self.folder = kind, folder
        self.failure = ""  # the last one, in one line
        self.note = ""  # of the tracker
        self._open_it, self._path = open_it, state_file(folder, kind)
        self._state = State.read(self._path)
        self._config = config_of(folder)
        self._tracker: Tracker | None = None
        self._lines: deque[Mapping[str, Any]] = deque()
        self._retry_at, self._pause_s = 0.0, FIRST_PAUSE_S

    @property
    def failures(self) -> int:
        """How often this run could not be written, earlier starts included."""
        return self._state.failures

    def advance(self, *, at_once: bool = False) -> bool:
        """Write what is new, unless a failure was a moment ago; return whether all of it is written.

        `at_once`: also directly after a failure.
        """
        if not at_once and time.monotonic() < self._retry_at:
            return False
        try:
            self._write_new(self._opened())
        except Exception as error:  # of another package, of any kind
            self._failed(error)
            return False
        self._pause_s = FIRST_PAUSE_S
        return True

    def finish(self, *, finished: bool) -> None:
        """Write what is left, the summary if the run has `finished`, and close the tracker; failures are counted."""
        if not self.advance(at_once=True) or self._tracker is None:
            return
        try:
            if finished:
                self._tracker.summary(flattened(read_summary(self.folder)))
            self._tracker.close(finished=finished)
        except Exception as error:
            self._failed(error)

    def missing(self) -> int:
        """How many steps of metrics.jsonl the tracker does not have."""
        return sum(line["step"] > self._state.step for line in MetricsTail(self.folder).poll())

    def _opened(self) -> Tracker:
        if self._tracker is None:
            name = str(self._config.get("name") or self.folder.resolve().name)
            learner = self._config.get("learner") or {}
            about = About(
                folder=self.folder,
                state=self._state,
                name=name,
                project=learner.get("project", "sgpo-async"),
                config=without_secrets(self._config),
            )
            self._tracker = self._open_it(self.kind, about)
            self._state, self.note = self._tracker.state, self._tracker.note
            self._state.write(self._path)
            self._lines.clear()
            self._metrics, self._samples = MetricsTail(self.folder), SamplesTail(self.folder)
        return self._tracker

    def _write_new(self, tracker: Tracker) -> None:
        state = self._state
        before = (state.step, state.samples)
        try:
            self._lines.extend(self._metrics.poll())
            while self._lines:
                line = self._lines[0]
                if line["step"] > state.step:
                    tracker.step(line["step"], scalars(line), histograms(line))
                    state.step = line["step"]
                self._lines.popleft()
            for sample in self._samples.poll():
                if self._due(sample["step"]):
                    tracker.samples(sample["step"], rows_of(sample))
                    state.samples = sample["step"]
        finally:
            if (state.step, state.samples) != before:
                state.write(self._path)

    def _due(self, step: int) -> bool:
        """Whether a sample of this step is the first one, or the first after another evaluation."""
        every = (self._config.get("evaluation") or {}).get("every", 10)
        return step > self._state.samples and (not self._state.samples or step // every > self._state.samples // every)

    def _failed(self, error: Exception) -> None:
        self._tracker = None
        self._state.failures += 1
        reason = " ".join(str(error).split()) or type(error).__name__
        self.failure = redacted(f"{type(error).__name__}: {reason}")[:REASON]
        self._retry_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


@contextmanager
def sole_writer(folder: Path, kind: str, *, patience_s: float) -> Iterator[bool]:
    """No other process writes this run to this tracker in this context, in which ENVIRONMENT applies.

    Yields false if another one still does after `patience_s`.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    path = state_file(folder, kind).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(TICK_S)
            else:
                yield True
                return


def rows_of(sample: Mapping[str, Any]) -> list[list[Any]]:
    """The first rollouts without and with the strategy of a line of samples.jsonl, as rows of COLUMNS."""
    rollouts = [
        rollout
        for guided in (False, True)
        for rollout in [one for one in sample["rollouts"] if one["guided"] == guided][:SHOWN]
    ]
    return [
        [
            *(sample["step"], sample.get("task"), rollout["guided"], str(sample.get("problem"))[:CHARS]),
            *(rollout["text"][:CHARS], rollout["reward"], rollout["correct"], rollout["tokens"]),
            max(rollout["versions"], default=None),
        ]
        for rollout in rollouts
    ]


def config_of(folder: Path) -> dict[str, Any]:
    """config.yaml of a run as plain data, {} without it; not checked, because another release may have written it."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
