"""What a role tells while it runs: one line an event on standard error, for a person or for a machine.

    --log-format human    12:03:04 actor-0      engine ready after 3.1 s
    --log-format json     {"time": ..., "level": "INFO", "role": "actor", "name": "actor-0", "message": ...}

Modules log by `logging.getLogger(__name__)`; a command calls `set_up` once. Results that were asked for (tables, paths)
are not logs: they are printed on standard output.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from typing import Literal, TextIO

Format = Literal["human", "json"]

FORMAT, LEVEL = "SGPO_ASYNC_LOG_FORMAT", "SGPO_ASYNC_LOG_LEVEL"  # environment variables: child processes inherit them
LEVELS = ("debug", "info", "warning", "error")


def set_up(role: str, *, name: str = "") -> None:
    """Send this package's log records to standard error, in the format and from the level that the environment names.

    Args:
        role: what this process is, e.g. "actor".
        name: which one, e.g. "actor-0". A learner's rank is taken from torchrun's RANK.
    """
    handler = _Stderr()
    machine = os.environ.get(FORMAT) == "json"
    handler.setFormatter(_Json(role, name) if machine else _Human(role, name))
    package = logging.getLogger("sgpo_async")
    package.handlers = [handler]
    package.setLevel(os.environ.get(LEVEL, "info").upper())


def _rank() -> int | None:
    """Of a process that torchrun started."""
    rank = os.environ.get("RANK")
    return int(rank) if rank is not None else None


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the moment of each record, not to what it was at `set_up`."""

    @property
    def stream(self) -> TextIO:
        """Where records go."""
        return sys.stderr

    @stream.setter
    def stream(self, _value: object) -> None:
        """The base class sets it once; nothing is kept."""


class _Human(logging.Formatter):
    """Time, who, and from warnings on the level."""

    def __init__(self, role: str, name: str) -> None:
        rank = _rank()
        self._who = name or (f"{role}-{rank}" if rank is not None else role)
        super().__init__(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        lines = [f"{self.formatTime(record, self.datefmt)} {self._who:12} {level}{record.getMessage()}"]
        return "\n".join(lines + ([self.formatException(record.exc_info)] if record.exc_info else []))


class _Json(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, role: str, name: str) -> None:
        self._who = {"role": role, "name": name or role, "rank": _rank()}
        super().__init__()

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, **self._who, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
