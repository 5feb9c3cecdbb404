"""Which faults a run meets, and when: a pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Action = Literal[
    "kill", "stop", "delay", "duplicate", "reorder", "truncate", "corrupt", "reset", "cut off", "full disk", "slow disk"
]
Target = Literal["hub", "learner", "rank", "actor", "sender", "receiver", "tracker"]

ON_PROCESSES: tuple[tuple[Action, tuple[Target, ...]], ...] = (
    ("kill", ("hub", "learner", "rank", "actor", "sender", "receiver", "tracker")),
    ("stop", ("hub", "rank", "actor", "sender", "receiver")),
    ("full disk", ("hub", "rank")),
    ("slow disk", ("hub",)),
)
ON_MESSAGES: tuple[Action, ...] = ("delay", "duplicate", "reorder", "truncate", "corrupt")
ON_CONNECTIONS: tuple[Action, ...] = ("reset", "cut off")

KINDS: tuple[tuple[Action, Target], ...] = (
    *((action, target) for action, targets in ON_PROCESSES for target in targets),
    *((action, target) for action in (*ON_MESSAGES, *ON_CONNECTIONS) for target in ("actor", "learner")),
)
LONGEST_S = 4.0  # that a fault lasts
MOST_MESSAGES = 6  # that it hits
LAST_STEPS = 3  # without new faults, so that the run can end


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault; what it does not need is drawn nevertheless."""

    number: int
    step: int  # it happens when so many steps are trained,
    after_s: float  # and so many seconds have passed since then
    action: Action
    target: Target
    pick: float  # in [0, 1): which of the processes of this kind
    seconds: float  # how long it lasts
    messages: int  # how many messages it hits
    to_hub: bool  # their direction
    seed: int  # of what is drawn when it happens

    @property
    def kind(self) -> str:
        """E.g. "kill hub"."""
        return f"{self.action} {self.target}"


def schedule(*, seed: int, faults: int, steps: int, kinds: Sequence[tuple[Action, Target]] = KINDS) -> list[Fault]:
    """The faults in the order in which they happen; each kind occurs equally often, or once more."""
    rng = Random(seed)
    chosen: list[tuple[Action, Target]] = []
    while len(chosen) < faults:
        chosen += rng.sample(kinds, len(kinds))
    at = sorted(rng.randint(1, max(1, steps - LAST_STEPS)) for _ in range(faults))
    return [
        Fault(
            number=number,
            step=step,
            after_s=rng.uniform(0, 1),
            action=action,
            target=target,
            pick=rng.random(),
            seconds=rng.uniform(0.3, LONGEST_S),
            messages=rng.randint(1, MOST_MESSAGES),
            to_hub=rng.random() < 0.5,
            seed=rng.getrandbits(32),
        )
        for number, (step, (action, target)) in enumerate(zip(at, chosen[:faults], strict=True))
    ]
