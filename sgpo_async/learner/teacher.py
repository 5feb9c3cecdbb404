"""The teacher, which reads a rollout with its context: the policy itself, a copy of it, or the behaviour policy.

    self       no copy: the current weights (Eq. 3)
    ema        a copy, updated after every step:       copy <- d copy + (1 - d) policy
    snapshot   a copy, updated after every n-th step:  copy <- policy
    frozen     a copy, never updated: the initial weights of the run (no copy if adapters are trained: the policy
               without them)
    behaviour  no copy: the probabilities that the engine reported while sampling (`learner.teacher_targets`)

A copy is sharded like the policy. On each rank it takes 1/ranks of its size, plus what FSDP keeps gathered: all of a
small model, or the embedding and the output matrix of a large model. Every teacher except `behaviour` costs a forward
pass without gradient over each rollout that it reads, after its prompt with the context (rlcsd: for each context).

The moving average (ema) is kept in float32. A step changes it by 1 - d of its distance from the policy. With d = 0.99
and a distance below a sixth of the value, this change is less than 2^-9 of the value. bfloat16 would round it away, and
the average would never change. A snapshot or a frozen copy in bfloat16 only rounds the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sgpo_async.algorithm import Kept
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.lora import without_adapters
from sgpo_async.learner.packing import Packed
from sgpo_async.learner.policy import Policy


class Teacher:
    """The teacher of one rank.

    Attributes:
        copy: sharded, without gradient; None for `self`, `behaviour`, and `frozen` if adapters are trained.
        nbytes: size of the copy, over all ranks.
    """

    def __init__(self, algorithm: Algorithm, copy: Policy | None, *, kind: str = "") -> None:
        """`kind`: of the teacher, if it is not that of `algorithm`."""
        self._algorithm, self.copy, self._kind = algorithm, copy, kind or algorithm.teacher
        # Compute it now: after a forward the gathered parameters have the dtype of the computation.
        self.nbytes = sum(p.numel() * p.element_size() for p in copy.parameters()) if copy else 0

    @property
    def moving(self) -> Policy | None:
        """The copy if it changes and must be saved in checkpoints; a frozen copy can be reloaded from `model.path`."""
        return None if self._kind == "frozen" else self.copy

    @torch.no_grad()
    def hidden(self, policy: Policy, packed: Packed) -> Tensor:
        """Compute the teacher's hidden states, see `Policy.hidden`: [C, H]. A collective of all ranks.

        They are divided by `teacher_temperature`, and so are the logits, which are linear in them.
        """
        temperature = self._algorithm.teacher_temperature
        with self._weights(policy) as weights:
            found = weights.hidden(packed)
        return found if temperature == 1 else found / temperature

    @torch.no_grad()
    def log_probabilities(self, policy: Policy, packed: Packed, temperature: float, kept: Kept | None = None) -> Tensor:
        """Compute the teacher's log-probability of each completion token: [C]. A collective of all ranks.

        It is that at the sampling temperature: `teacher_temperature` is of distillation alone.
        """
        with self._weights(policy) as weights:
            return weights.log_probabilities(packed, temperature, kept)

    @contextmanager
    def _weights(self, policy: Policy) -> Iterator[Policy]:
        """The weights that teach."""
        own = self._kind == "frozen" and policy.lora.rank and not self.copy
        with without_adapters(policy) if own else nullcontext():
            yield self.copy or policy

    @property
    def matrix(self) -> Tensor | None:
        """The output matrix of the copy, gathered after its forward; None without a copy."""
        return self.copy.head if self.copy else None

    @torch.no_grad()
    def follow(self, policy: Policy, *, steps: int) -> None:
        """Update the copy from the policy, if this is due after `steps` optimiser steps. No communication."""
        share = self._share(steps)
        if self.copy is None or not share:
            return
        assert isinstance(self.copy, FSDPModule)
        self.copy.reshard()  # discard its gathered parameters, which are about to change
        for old, new in zip(self.copy.parameters(), policy.parameters(), strict=True):
            assert isinstance(old, DTensor)
            assert isinstance(new, DTensor)
            if share == 1:
                old.to_local().copy_(new.to_local())
            else:
                old.to_local().lerp_(new.to_local(), share)

    def _share(self, steps: int) -> float:
        """Return the weight of the policy in the copy's update after this step: 0 for no update, 1 for a full copy."""
        if self._kind == "ema":
            return 1 - self._algorithm.teacher_decay
        return float(self._kind == "snapshot" and steps % self._algorithm.teacher_every == 0)
