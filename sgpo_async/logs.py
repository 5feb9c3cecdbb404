"""Logs of a running process: one line per event on standard error, for people or for programs.

    --log-format human    12:03:04 actor-0      engine ready after 3.1 s
    --log-format json     {"time": ..., "level": "INFO", "role": "actor", "name": "actor-0", "message": ...}

Modules use `logging.getLogger(__name__)`, and `extra=fields(...)` for values that programs read from the JSON object; a
command calls `set_up` once. The results of a command (tables, paths) are
not logs: the command prints them on standard output.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from typing import Any, Literal, TextIO

Format = Literal["human", "json"]

FORMAT, LEVEL = "SGPO_ASYNC_LOG_FORMAT", "SGPO_ASYNC_LOG_LEVEL"  # environment variables, which child processes inherit
LEVELS = ("debug", "info", "warning", "error")


def set_up(role: str, *, name: str = "") -> None:
    """Send this package's log records to standard error; environment variables set their format and lowest level.

    Args:
        role: the kind of process, e.g. "actor".
        name: the name of this process, e.g. "actor-0"; "": the role, with torchrun's RANK if it is set.
    """
    handler = _Stderr()
    json_format = os.environ.get(FORMAT) == "json"
    handler.setFormatter(_Json(role, name) if json_format else _Human(role, name))
    package = logging.getLogger("sgpo_async")
    package.handlers = [handler]
    package.setLevel(os.environ.get(LEVEL, "info").upper())


def fields(**values: Any) -> dict[str, Any]:
    """Make the argument `extra` of a log call: in the JSON format these values are keys beside the message."""
    return {"fields": values}


def printable(text: str) -> str:
    """Text from outside with control characters as escapes, except for newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(value: object, chars: int = 300) -> str:
    """The first `chars` characters of a text from outside, in one printable line."""
    return printable(str(value)[:chars]).replace("\n", "\\n")


def _rank() -> int | None:
    """The rank of this process if torchrun started it, else None."""
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
    """Time, name of the process, level if it is a warning or worse, message."""

    def __init__(self, role: str, name: str) -> None:
        rank = _rank()
        self._process = name or (f"{role}-{rank}" if rank is not None else role)
        super().__init__(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = f"{self.formatTime(record, self.datefmt)} {self._process:12} {level}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, role: str, name: str) -> None:
        self._process = {"role": role, "name": name or role, "rank": _rank()}
        super().__init__()

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        head = {"time": time, "level": record.levelname, **self._process, "message": record.getMessage()}
        line = head | getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
