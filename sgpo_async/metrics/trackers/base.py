"""What a tracker can do, what it is given, and what is kept of it between two starts of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sgpo_async.files import to_json, write_whole

FOLDER = "trackers"  # below the run's folder: the state of each tracker
FINISHED, INTERRUPTED = b"finished", b"interrupted"  # what a tracker's process is told at the end of a run ...
END_S = 20.0  # ... after which it has so long to write the rest
COLUMNS = ("step", "task", "strategy", "problem", "completion", "reward", "correct", "tokens", "version")
SECRET = ("key", "token", "password", "secret")  # ends of the names of settings and variables that hold one
SECRET_CHARS = 8  # a shorter value of such a variable is no secret, but may be a part of many texts


@dataclass(kw_only=True)
class State:
    """What a tracker has: everything up to `step`, and samples up to the step `samples`."""

    id: str = ""  # of the run in the tracker; "": there is none yet
    step: int = 0
    samples: int = 0
    failures: int = 0  # how often it could not be written

    @classmethod
    def read(cls, path: Path) -> State:
        """The state in this file; a new one if it is missing or damaged."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        return cls()

    def write(self, path: Path) -> None:
        """Replace the file. Raises SgpoError."""
        write_whole(path, to_json(asdict(self)) + "\n")


@dataclass(frozen=True, kw_only=True)
class About:
    """The run that a tracker is told of."""

    folder: Path
    state: State  # what the tracker should have, by the last start; the tracker corrects it
    name: str
    project: str
    config: Mapping[str, Any] = field(default_factory=dict)  # without secrets


class Tracker(Protocol):
    """One run in a tracker, opened by `open_tracker`. Every method may raise anything, and may hang."""

    @property
    def state(self) -> State:
        """What the tracker has; the caller keeps step and samples up to date."""

    @property
    def note(self) -> str:
        """What the user should know, such as where an offline run lies; "" for nothing."""

    def step(self, step: int, values: Mapping[str, float], counts: Mapping[str, Mapping[int, float]]) -> None:
        """Write the numbers of a step by name, and histograms: tokens by lag."""

    def samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """Write a table of COLUMNS: completions of a batch."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Write the final metrics."""

    def close(self, *, finished: bool) -> None:
        """Everything is written; `finished`: the run has trained all steps, else it may be resumed."""


def open_tracker(kind: str, about: About) -> Tracker:
    """Open a tracker of this kind, or go on with the run of `about.state.id`. May raise anything, and may hang."""
    tracker: Tracker = import_module(f"sgpo_async.metrics.trackers.to_{kind}").open_run(about)
    return tracker


def state_file(folder: Path, kind: str) -> Path:
    """Where the state of a tracker is."""
    return folder / FOLDER / f"{kind}.json"


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested mappings, with names like ledger/dropped/stale."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def without_secrets(value: Any, key: str = "") -> Any:
    """A configuration as trackers may see it: no user and password in URLs, and no value of a key that holds one."""
    if isinstance(value, Mapping):
        return {name: without_secrets(one, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [without_secrets(one, key) for one in value]
    if isinstance(value, str):
        return "***" if value and key.lower().endswith(SECRET) else redacted(value)
    return value


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text without user and password in URLs, and without the values of variables that hold a secret."""
    text = re.sub(r"(?<=://)[^/@\s'\"]+@", "***@", text)
    for name, value in environment.items():
        if name.lower().endswith(SECRET) and len(value) >= SECRET_CHARS:
            text = text.replace(value, "***")
    return text
