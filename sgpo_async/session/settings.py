"""The settings that a child process receives as its command-line argument."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.wire.records import Road

Deltas = Literal["auto", "always", "never"]
"""auto: if the weight sender is on another machine. On one machine, copying is faster than encoding."""


@dataclass(frozen=True)
class Deadlines:
    """Timeouts of a session, in seconds."""

    start_s: float = 120.0  # for this process to import torch
    join_s: float = 60.0  # for both processes to join the world
    call_s: float = 10.0  # for the answer to one call: one bucket, one announcement
    heartbeat_s: float = 1.0  # between two heartbeats; a peer that answers none for heartbeat_s + call_s is gone
    # Without a new bucket from an actor that still receives the version itself, or without an answer of a folder.
    silence_s: float = 60.0
    file_s: float = 300.0  # to read or write one bucket of a folder, which shows no progress
    group_s: float = 60.0  # for one phase of a weight-update group: to join, to broadcast a version


JOBS = ("sgpo_async.engines.sglang.weight_sync.layout:digest_and_checksums",)  # MODULE:NAME


@dataclass(frozen=True)
class Settings:
    """Settings of a weight sender or a weight receiver; all users of the machine can read them."""

    name: str  # of the receiving side, for messages
    parent: int  # process id of the parent; the child ends when the parent is gone
    store: str = ""  # weight sender: the store that it serves; weight receiver: the one it writes
    host: str = ""  # weight sender: where to listen
    cuda: bool = False  # weight sender: may use this machine's GPUs, for weight-update groups over NCCL
    road: Road = "rpc"
    folder: str = ""  # weight uploader: where it copies to
    deltas: Deltas = "auto"  # weight receiver: whether to pull the difference to the version that it has
    # Weight sender: the functions that it computes on its weights (`WeightGroups.compute`).
    jobs: list[str] = field(default_factory=lambda: list(JOBS))
    pulls: bool = True  # weight receiver: pull every announced version; false: only when the actor requests it
    deadlines: Deadlines = field(default_factory=Deadlines)

    def encode(self) -> str:
        """Return the settings as one command-line argument."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> Settings:
        """Invert `encode`."""
        fields = json.loads(text)
        return cls(**{**fields, "deadlines": Deadlines(**fields["deadlines"])})
