"""What a child process is told on its command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deadlines:
    """How long a session waits, in seconds, before it gives its peer up."""

    start_s: float = 120.0  # for this process to import torch
    join_s: float = 60.0  # for both sides to meet
    call_s: float = 10.0  # for the answer to one call: one bucket, one announcement
    beat_s: float = 1.0  # between two signs of life; a peer that answers none for beat_s + call_s is gone
    group_s: float = 60.0  # for one phase of a weight-update group: to join, to broadcast a version


@dataclass(frozen=True)
class Settings:
    """Settings of a link or a node process."""

    name: str  # of the actor, for messages
    parent: int  # process id; the child ends when it is no longer its child
    store: str = ""  # link: the learner's weight store
    host: str = ""  # link: where to listen
    cuda: bool = False  # link: may use this machine's GPUs, for weight-update groups over NCCL
    pulls: bool = True  # node: pulls every version that is announced; otherwise on demand
    deadlines: Deadlines = field(default_factory=Deadlines)

    def encode(self) -> str:
        """As one command-line argument."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Settings:
        """The inverse of `encode`."""
        fields = json.loads(text)
        return cls(**{**fields, "deadlines": Deadlines(**fields["deadlines"])})
