"""Who is let in."""

from __future__ import annotations

from collections.abc import Collection

from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.wire.records import Hello

LONGEST_NAME = 64  # characters: it becomes a word of a command line, and stands in every message about its bearer


def refusal(hello: Hello, *, taken: Collection[str], world: LearnerRanks | None) -> str | None:
    """Why this Hello is refused, with the remedy; None if it is welcome.

    `taken` are the names of living members, `world` is the learner world that this Hello would join (None: it opens a
    new one, or is an actor's).
    """
    if not 0 < len(hello.name) <= LONGEST_NAME:
        return f"a name of {len(hello.name)} characters: choose one of 1 to {LONGEST_NAME}"
    if hello.name in taken:
        return f"name {hello.name!r} is taken by a living member: choose another, or wait until that one is given up"
    if hello.role == "learner" and not 0 <= hello.rank < hello.world_size:
        return f"rank {hello.rank} is outside its world of {hello.world_size}: start learners by torchrun"
    if world is not None and hello.world_size != world.size:
        return (
            f"{hello.name} belongs to a world of {hello.world_size} ranks but a world of {world.size} is here: "
            "stop that one first"
        )
    return None


def other_tokenizer(name: str, fingerprint: str, *, learners: str) -> str | None:
    """Why the member `name` cannot work for a learner with another tokenizer, with the remedy; None if it can.

    An empty fingerprint fits all: before a learner has come, actors are taken as they come.
    """
    if not learners or not fingerprint or fingerprint == learners:
        return None
    return f"tokenizer of {name} is {fingerprint} but the learner's is {learners}: give it the same model.path"
