"""Validation of a Hello: which members may join."""

from __future__ import annotations

from collections.abc import Collection

from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.wire.records import Hello

MAX_NAME_LENGTH = 64  # characters; names appear in command lines, and in every message about the member


def refusal_reason(hello: Hello, *, taken: Collection[str], world: LearnerRanks | None) -> str | None:
    """Why the hub refuses this Hello, with the remedy; None if the member may join.

    `taken` are the names of the connected members. `world` is the learner world that the Hello would join; it is None
    if the Hello starts a new world or comes from an actor.
    """
    if not 0 < len(hello.name) <= MAX_NAME_LENGTH:
        return f"the name must have 1 to {MAX_NAME_LENGTH} characters, got {len(hello.name)}: choose another name"
    if not hello.name.isprintable():  # the hub logs it, and all displays show it
        return f"the name must have printable characters only, got {hello.name!r}: choose another name"
    if hello.name in taken:
        return (
            f"the name {hello.name!r} is taken by a connected member: "
            "choose another name, or wait until the hub removes that member"
        )
    if hello.role == "learner" and not 0 <= hello.rank < hello.world_size:
        return f"rank must be in [0, {hello.world_size - 1}], got {hello.rank}: start the learner with torchrun"
    if world is not None and hello.world_size != world.size:
        return (
            f"the world size of {hello.name} is {hello.world_size}, but the connected learner has a world size of "
            f"{world.size}: stop the connected learner first"
        )
    return None


def tokenizer_mismatch(name: str, fingerprint: str, *, learners: str) -> str | None:
    """Why the tokenizer of member `name` does not match the learner's, with the remedy; None if it matches.

    An empty fingerprint matches every other one: the hub accepts any actor until the first learner has joined.
    """
    if not learners or not fingerprint or fingerprint == learners:
        return None
    return (
        f"the tokenizer of {name} is {fingerprint}, but the learner's is {learners}: "
        f"set model.path of {name} to the learner's"
    )
