"""The present state of a group: finished rollouts, and the tokens of the others.

    Progress ─▶ Arrived.report ─┐
    Rollout ──▶ Arrived.finish ─┴─▶ (the actor is lost) ─▶ Lease.finished, Lease.partial ─▶ another actor continues

What an actor has sampled since its last report is lost with the actor, and sampled again. That favours no length if

- the engine samples the same tokens again (`Engine.reproducible`), or
- reports are made at fixed times, and finished rollouts are delivered with them. Then everything in one interval of
  time is lost, whether rollouts ended in it or not.

If a rollout were delivered as soon as it is finished, only intervals in which no rollout ended would be sampled again,
which favours short rollouts. To keep only whole groups would favour them, too. docs/durability.md has a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sgpo_async.wire.records import OBSERVED, PartialRollout, Rollout


@dataclass(kw_only=True)
class Arrived:
    """What the hub has received of one group of `size` rollouts."""

    size: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # finished, by slot
    reports: dict[int, list[PartialRollout]] = field(default_factory=dict)  # of the others, by slot, in order
    oldest_version: int | None = field(init=False, default=None)  # of all tokens; None if there are no tokens

    def __post_init__(self) -> None:
        for rollout in self.rollouts.values():
            self._see(rollout.versions)
        for part in (part for reports in self.reports.values() for part in reports):
            self._see(part.versions)

    def report(self, part: PartialRollout) -> bool:
        """Add the tokens of a report; False if tokens before them are missing, or if the rollout is finished."""
        if part.slot in self.rollouts:
            return False
        if part.start == 0:
            self.reports[part.slot] = [part]
        elif part.start == self.sampled(part.slot):
            self.reports[part.slot].append(part)
        else:
            return False
        self._see(part.versions)
        return True

    def prompt(self, *, guided: bool) -> np.ndarray | None:
        """The prompt of the finished rollouts, the one with the strategy if `guided`; None if it is not known."""
        prompts = (one.prompt for one in self.rollouts.values() if one.guided == guided and len(one.prompt))
        return next(prompts, None)

    @property
    def missing(self) -> int:
        """How many rollouts are not finished."""
        return self.size - len(self.rollouts)

    def finish(self, rollout: Rollout) -> None:
        """Keep a finished rollout; it replaces the reports of its slot."""
        self.rollouts[rollout.slot] = rollout
        self.reports.pop(rollout.slot, None)
        self._see(rollout.versions)

    def sampled(self, slot: int) -> int:
        """How many tokens of an unfinished rollout are known."""
        reports = self.reports.get(slot)
        return reports[-1].start + len(reports[-1].tokens) if reports else 0

    def versions_before(self, part: PartialRollout) -> list[np.ndarray]:
        """The versions of the reports that this one continues; none if it begins anew, or if tokens are missing."""
        continues = 0 < part.start == self.sampled(part.slot)
        return [one.versions for one in self.reports[part.slot]] if continues else []

    def partial(self) -> tuple[PartialRollout, ...]:
        """All unfinished rollouts that have tokens, each with all its tokens."""
        return tuple(join(reports) for _, reports in sorted(self.reports.items()))

    def _see(self, versions: np.ndarray) -> None:
        """Keep the oldest version: the hub asks for that of every running group, often."""
        sampled = [version for version in versions.tolist() if version != OBSERVED]
        if self.oldest_version is not None:
            sampled.append(self.oldest_version)
        self.oldest_version = min(sampled, default=None)


def join(parts: Sequence[PartialRollout]) -> PartialRollout:
    """Join consecutive parts of one completion; neighbouring spans of the same weights become one span."""
    first = parts[0]
    starts = np.array([part.start - first.start for part in parts])
    versions = np.concatenate([part.versions for part in parts])
    digests = np.concatenate([part.digests for part in parts])
    ends = np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=True)]).astype(np.int32)
    changes = (versions[1:] != versions[:-1]) | (digests[1:] != digests[:-1])
    last = np.append(changes, True)  # the spans after which the weights change
    return PartialRollout(
        slot=first.slot,
        start=first.start,
        tokens=np.concatenate([part.tokens for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        versions=versions[last],
        digests=digests[last],
        ends=ends[last],
        top_tokens=_joined([part.top_tokens for part in parts]),
        top_logprobs=_joined([part.top_logprobs for part in parts]),
        kept=_joined([part.kept for part in parts]),
        kept_sizes=_joined([part.kept_sizes for part in parts]),
        finish=parts[-1].finish,
    )


def after(part: PartialRollout, position: int) -> PartialRollout | None:
    """The tokens of `part`, which starts at 0, from `position` on; None if there are none."""
    assert part.start == 0
    length = len(part.tokens)
    if position >= length:
        return None
    kept = part.ends > position
    k = len(part.top_tokens) // length if part.top_tokens is not None else 0
    sizes = part.kept_sizes if part.kept_sizes is not None else np.empty(0, np.int32)
    return PartialRollout(
        slot=part.slot,
        start=position,
        tokens=part.tokens[position:],
        logprobs=part.logprobs[position:],
        versions=part.versions[kept],
        digests=part.digests[kept],
        ends=part.ends[kept] - np.int32(position),
        top_tokens=part.top_tokens[position * k :] if part.top_tokens is not None else None,
        top_logprobs=part.top_logprobs[position * k :] if part.top_logprobs is not None else None,
        kept=part.kept[int(sizes[:position].sum()) :] if part.kept is not None else None,
        kept_sizes=sizes[position:] if part.kept is not None else None,
        finish=part.finish,
    )


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if len(present) == len(arrays) else None
