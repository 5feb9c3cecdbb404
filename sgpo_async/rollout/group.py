"""The state of one lease: which of its rollouts are requested, generated, judged and finished. No I/O.

    Lease ─▶ requests ─▶ Generated ─▶ verdict ─┬──────────────────────▶ Rollout
                ▲                              ├▶ Score ─▶ Scored ─────▶ Rollout     possible targets (Eq. 4), if asked
                └─────────── reply ────────────┘ of an environment, if the episode goes on
             progress ─▶ what the unfinished rollouts have sampled since the last report

A lease may contain rollouts that another actor has begun; they are continued from their tokens.

Nothing here waits or sends: the rollout loop (`sampler`) feeds results in and takes rollouts out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import xxhash

from sgpo_async.engines.base import Generate, Generated, SampledTokens, Score, Scored
from sgpo_async.rollout.partial import after, join
from sgpo_async.transport.reliable import Key
from sgpo_async.wire.records import (
    OBSERVED,
    Lease,
    PartialRollout,
    Progress,
    Rollout,
    sampled_by_policy,
)


class RolloutGroup:
    """The rollouts of one lease."""

    def __init__(self, lease: Lease, *, plain: np.ndarray, guided: np.ndarray | None) -> None:
        assert guided is not None or lease.guided == 0, "a guided rollout needs a prompt with the strategy"
        self.lease = lease
        self._prompts = {False: plain, True: guided}
        self._begun = {part.slot: part for part in lease.partial}
        self._open = sorted(set(range(lease.autonomous + lease.guided)) - set(lease.finished.tolist()))
        self._generated: dict[int, Generated] = {}  # completions without a verdict or score
        self._unscored: dict[int, Rollout] = {}  # those of them that wait for a score
        self._reported = {slot: len(part.tokens) for slot, part in self._begun.items()}  # tokens that the hub knows

    @property
    def done(self) -> bool:
        """Whether every rollout of the lease is finished."""
        return not self._open

    @property
    def unfinished(self) -> int:
        """Number of unfinished rollouts."""
        return len(self._open)

    @property
    def generating(self) -> int:
        """Number of these without a completion."""
        return len(self._open) - len(self._generated)

    def requests(self) -> list[Generate | Generated]:
        """For each unfinished rollout a request, or its completion if only the verdict is missing; by slot."""
        return [self._completion(slot) or self._request(slot) for slot in self._open]

    def generated(self, result: Generated) -> None:
        """Keep a completion until its verdict comes."""
        self._generated[_slot(result.id)] = result

    def judged(self, key: object, *, reward: float) -> Rollout | Score:
        """Take a verdict; returns the finished rollout, or the score that the engine has to compute first (Eq. 4)."""
        slot = _slot(key)
        result = self._generated[slot]
        if result.finish == "length" and not self.lease.cut_scores:
            reward = 0.0
        rollout = self._rollout(slot, result, reward)
        if not (self.lease.unguided_scores and rollout.may_be_distilled):
            return self._finished(rollout)
        self._unscored[slot] = rollout
        return Score(id=result.id, prompt=self._prompt(False), tokens=result.tokens, temperature=self.lease.temperature)

    def turns(self, key: object) -> list[np.ndarray]:
        """The tokens of each completion of an episode, without the environment's replies."""
        result = self._generated[_slot(key)]
        sampled = sampled_by_policy(result.versions, result.ends)
        edges = np.flatnonzero(np.diff(sampled)) + 1
        parts = zip(np.split(result.tokens, edges), np.split(sampled, edges), strict=True)
        return [tokens for tokens, own in parts if own[0]]

    def replied(self, key: object, reply: np.ndarray) -> Generate | None:
        """Continue an episode after the environment's reply, [R] int32; None if its turns or tokens are used up."""
        slot = _slot(key)
        result = self._generated[slot]
        room = self.lease.max_new_tokens - len(result.tokens) - len(reply)
        if room < 1 or len(self.turns(key)) >= self.lease.turns:
            return None
        self._begun[slot] = _with_reply(slot, self._generated.pop(slot), reply)
        return self._request(slot)

    def scored(self, result: Scored) -> Rollout:
        """Take a score; the rollout carries the sum of its unguided log-probabilities, not their mean (Eq. 4)."""
        rollout = self._unscored.pop(_slot(result.id))
        own = result.logprobs[rollout.sampled]
        return self._finished(replace(rollout, unguided_logprob=float(own.sum(dtype=np.float64))))

    def rollout_ids(self) -> list[Key]:
        """The identities (task, attempt, slot) of all unfinished rollouts."""
        return [self._key(slot) for slot in self._open]

    def progress(self, running: Mapping[Hashable, SampledTokens], *, whole: bool = False) -> Progress | None:
        """What the unfinished rollouts have sampled since the last report; None if there is nothing new.

        Args:
            running: what the engine has sampled so far, by the ids of `rollout_ids`.
            whole: report all tokens again, because the hub may have lost reports.
        """
        parts = []
        for slot in self._open:
            sampled = self._generated.get(slot) or running.get(self._key(slot))
            if sampled is None:
                continue
            part = after(_part(slot, sampled), 0 if whole else self._reported.get(slot, 0))
            if part is not None:
                parts.append(part)
                self._reported[slot] = len(sampled.tokens)
        if not parts:
            return None
        return Progress(
            task=self.lease.task, attempt=self.lease.attempt, purpose=self.lease.purpose, partial=tuple(parts)
        )

    def _completion(self, slot: int) -> Generated | None:
        """The completion of a rollout that another actor has sampled completely; None for any other rollout."""
        part = self._begun.get(slot)
        if part is None or not part.finish:
            return None
        return Generated(id=self._key(slot), finish=part.finish, **_sampled(part))

    def _request(self, slot: int) -> Generate:
        begun = self._begun.get(slot)
        return Generate(
            id=self._key(slot),
            prompt=self._prompt(self._is_guided(slot)),
            max_new_tokens=self.lease.max_new_tokens,
            temperature=self.lease.temperature,
            seed=rollout_seed(self.lease.seed, slot),
            top_p=self.lease.top_p,
            top_k=self.lease.top_k,
            report_kept=self.lease.reports_kept,
            top_logprobs_num=self.lease.top_logprobs_num if self._is_guided(slot) else 0,
            min_version=self.lease.min_version,
            prefix=SampledTokens(**_sampled(begun)) if begun else None,
        )

    def _finished(self, rollout: Rollout) -> Rollout:
        del self._generated[rollout.slot]
        self._open.remove(rollout.slot)
        return rollout

    def _rollout(self, slot: int, result: Generated, reward: float) -> Rollout:
        """A judged completion; the engine's likeliest tokens are sent only of a possible target."""
        rollout = Rollout(
            task=self.lease.task,
            attempt=self.lease.attempt,
            slot=slot,
            purpose=self.lease.purpose,
            guided=self._is_guided(slot),
            prompt=self._prompt(self._is_guided(slot)),
            tokens=result.tokens,
            logprobs=result.logprobs,
            versions=result.versions,
            digests=result.digests,
            ends=result.ends,
            reward=reward,
            finish=result.finish,
            top_tokens=result.top_tokens,
            top_logprobs=result.top_logprobs,
            kept=result.kept,
            kept_sizes=result.kept_sizes,
            solved_at=self.lease.solved_at,
        )
        return rollout if rollout.may_be_distilled else replace(rollout, top_tokens=None, top_logprobs=None)

    def _is_guided(self, slot: int) -> bool:
        return slot >= self.lease.autonomous

    def _key(self, slot: int) -> Key:
        return (self.lease.task, self.lease.attempt, slot)

    def _prompt(self, guided: bool) -> np.ndarray:
        prompt = self._prompts[guided]
        assert prompt is not None
        return prompt


def group_of(lease: Lease, *, prompt: Callable[[str, str | None], Sequence[int]]) -> RolloutGroup:
    """The group of `lease`; `prompt(problem, strategy)` gives token ids (see `sgpo_async.tasks.prompts`)."""
    plain = np.asarray(prompt(lease.problem, None), dtype=np.int32)
    guided = np.asarray(prompt(lease.problem, lease.strategy), dtype=np.int32) if lease.guided else None
    return RolloutGroup(lease, plain=plain, guided=guided)


def task_of(key: object) -> tuple[int, int]:
    """(task, attempt) of a rollout's identity."""
    assert isinstance(key, tuple)
    return int(key[0]), int(key[1])


def rollout_seed(lease_seed: int, slot: int) -> int:
    """A 63-bit seed for each rollout that depends on the lease and the slot alone, not on the actor."""
    return xxhash.xxh3_64_intdigest(slot.to_bytes(4, "little"), seed=lease_seed & (2**63 - 1)) >> 1


def _sampled(part: PartialRollout) -> dict[str, Any]:
    """The fields of `SampledTokens`."""
    return {field.name: getattr(part, field.name) for field in fields(SampledTokens)}


def _part(slot: int, sampled: SampledTokens) -> PartialRollout:
    own = {field.name: getattr(sampled, field.name) for field in fields(SampledTokens)}
    return PartialRollout(slot=slot, start=0, finish=sampled.finish if isinstance(sampled, Generated) else "", **own)


def _with_reply(slot: int, result: Generated, reply: np.ndarray) -> PartialRollout:
    """An episode after its environment's reply: the next completion is still to be sampled."""
    length = len(reply)
    likely = 0 if result.top_tokens is None else length * (len(result.top_tokens) // len(result.tokens))
    observed = PartialRollout(
        slot=slot,
        start=len(result.tokens),
        tokens=reply,
        logprobs=np.zeros(length, np.float32),
        versions=np.array([OBSERVED], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([length], np.int32),
        top_tokens=np.zeros(likely, np.int32) if likely else None,
        top_logprobs=np.zeros(likely, np.float32) if likely else None,
        kept=None if result.kept is None else np.empty(0, np.int32),
        kept_sizes=None if result.kept is None else np.zeros(length, np.int32),
    )
    return join([_part(slot, result), observed])


def _slot(key: object) -> int:
    assert isinstance(key, tuple)
    return int(key[2])
