"""The messages that `session.calls` puts into the queue of a process's main thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Announced:
    """The learner has published this version; it can be pulled."""

    version: int


@dataclass
class Request:
    """A request of the actor to its weight sender that may take a while (see `session.rpc_server`)."""

    id: int
    method: str
    seconds: float  # until it fails
    arguments: dict[str, Any]


@dataclass
class Response:
    """The result of a `Request`: a value of JSON types, or an error as (class in `sgpo_async.errors`, message)."""

    id: int
    value: Any = None
    error: tuple[str, str] | None = None
