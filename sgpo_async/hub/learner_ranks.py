"""The learner's ranks. All ranks of a learner world start and end together, as torchrun starts and ends them.

Therefore a Hello starts a new world, which replaces all ranks of the old one, if

- no rank is present,
- its own rank is already present (unless the same process repeats its Hello before any work was done),
- a rank of the present world has left, or
- the present world is complete and the Hello has another world size.

The ranks of the old world count as gone even if they never said Goodbye. Silence is a weak sign that a rank has died,
because a training process sends nothing during a long step.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgpo_async.wire.records import Hello


@dataclass
class Rank:
    """One learner rank."""

    member: bytes
    name: str
    last_seen: float  # time of its last message


class LearnerRanks:
    """The connected ranks of the learner, and what each of them has requested: a step, and a part of its batch."""

    def __init__(self) -> None:
        self.size = 0  # world size
        self.ranks: dict[int, Rank] = {}
        self.requested: dict[int, tuple[int, int]] = {}  # rank -> (step, part), until that step is committed
        self.last_committed = -1  # newest step that this world has committed
        self.broken = False  # a rank has left
        self.stopping = ""  # why this world has to stop; empty if it goes on

    @property
    def complete(self) -> bool:
        """Whether all ranks are connected and none has left."""
        return 0 < self.size == len(self.ranks) and not self.broken

    @property
    def all_requested(self) -> bool:
        """Whether the world is complete and every rank has requested something."""
        return self.complete and len(self.requested) == self.size

    def all_wait_for(self, step: int, part: int) -> bool:
        """Whether the world is complete and every rank has requested this part, and no later one."""
        return self.all_requested and set(self.requested.values()) == {(step, part)}

    def rank_of(self, member: bytes) -> int | None:
        """The rank of this member; None if it is not a learner."""
        return next((rank for rank, held in self.ranks.items() if held.member == member), None)

    def starts_new_world(self, member: bytes, hello: Hello) -> bool:
        """Whether this Hello comes from a new world that replaces the present one; see the top of the module."""
        held = self.ranks.get(hello.rank)
        working = hello.rank in self.requested or self.last_committed >= 0
        repeated = held is not None and held.member == member and not working
        other_size = self.complete and hello.world_size != self.size
        return self.broken or not self.ranks or other_size or (held is not None and not repeated)

    def start_new_world(self, size: int) -> list[Rank]:
        """Begin a new world of `size` ranks; return the ranks of the old one."""
        old = list(self.ranks.values())
        self.size, self.ranks, self.requested, self.last_committed = size, {}, {}, -1
        self.broken, self.stopping = False, ""
        return old

    def mark_committed(self, step: int) -> None:
        """Record that `step` is committed: forget the requests for it and for earlier steps."""
        self.last_committed = step
        self.requested = {rank: requested for rank, requested in self.requested.items() if requested[0] > step}

    def join(self, member: bytes, hello: Hello, *, now: float) -> None:
        """Add a rank to the present world."""
        self.ranks[hello.rank] = Rank(member, hello.name, now)

    def any_since(self, time: float) -> bool:
        """Whether a rank has sent anything since `time`."""
        return any(rank.last_seen >= time for rank in self.ranks.values())

    def leave(self, rank: int) -> None:
        """Remove a rank. This world gets no more batches."""
        del self.ranks[rank]
        self.requested.clear()
        self.broken = True
