"""The learner's ranks. They come and go together, as torchrun starts and ends them.

A Hello of a rank that is here already, or after any rank has left, or of another number of ranks while all are here,
therefore opens a new world: all ranks of the old one are gone, whether or not they managed to say so. A rank's silence
means little, since a training process sends nothing during a long step.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgpo_async.wire.records import Hello


@dataclass
class Rank:
    """One learner rank."""

    member: bytes
    name: str
    seen: float  # when it last gave a sign of life


class LearnerRanks:
    """The ranks that are here, and which step's batch each has asked for."""

    def __init__(self) -> None:
        self.size = 0
        self.ranks: dict[int, Rank] = {}
        self.asked: dict[int, int] = {}  # rank -> step, until that step commits
        self.served = -1  # newest step that this world has committed
        self.broken = False  # a rank has left

    @property
    def complete(self) -> bool:
        """Whether all ranks are here and none has left."""
        return 0 < self.size == len(self.ranks) and not self.broken

    @property
    def all_asked(self) -> bool:
        """Whether every rank of the complete world waits for a batch."""
        return self.complete and len(self.asked) == self.size

    def rank_of(self, member: bytes) -> int | None:
        """The rank of this member; None if it is not a learner."""
        return next((rank for rank, held in self.ranks.items() if held.member == member), None)

    def opens_new(self, member: bytes, hello: Hello) -> bool:
        """Whether this Hello is of a world that replaces the present one, not just a repetition."""
        held = self.ranks.get(hello.rank)
        at_work = hello.rank in self.asked or self.served >= 0
        repeated = held is not None and held.member == member and not at_work
        other_size = self.complete and hello.world_size != self.size
        return self.broken or not self.ranks or other_size or (held is not None and not repeated)

    def reopen(self, size: int) -> list[Rank]:
        """Begin a new world; return the ranks of the old one."""
        old = list(self.ranks.values())
        self.size, self.ranks, self.asked, self.served, self.broken = size, {}, {}, -1, False
        return old

    def committed(self, step: int) -> None:
        """Requests up to `step` are served."""
        self.served = step
        self.asked = {rank: asked for rank, asked in self.asked.items() if asked > step}

    def join(self, member: bytes, hello: Hello, *, now: float) -> None:
        """A rank has come."""
        self.ranks[hello.rank] = Rank(member, hello.name, now)

    def leave(self, rank: int) -> None:
        """A rank is gone: this world gets no more batches."""
        del self.ranks[rank]
        self.asked.clear()
        self.broken = True
