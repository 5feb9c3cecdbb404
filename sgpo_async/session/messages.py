"""What the two members of a world tell each other by `session.calls`, and their threads pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Announced:
    """A version is there to be pulled."""

    version: int


@dataclass
class Control:
    """A word for the actor."""

    word: str


@dataclass
class Ask:
    """Something that the actor asks of its link and that may take a while (see `session.rpc_server`)."""

    id: int
    what: str
    seconds: float  # until it fails
    arguments: dict[str, Any]


@dataclass
class Answer:
    """What came of an `Ask`: a value of JSON types, or an error as (class in `sgpo_async.errors`, message)."""

    id: int
    value: Any = None
    error: tuple[str, str] | None = None
