"""Whose guided distribution is distilled: the policy itself, or a copy that follows it more slowly.

    self       no copy: the present weights (Eq. 3)
    ema        after every step   copy <- d copy + (1 - d) policy
    snapshot   after every n-th   copy <- policy
    frozen     never: the weights that the run began with
    behaviour  no copy: what the engine told as it sampled (`guides.TopKTargets`)

A copy is sharded like the policy, so it costs 1/ranks of its size on each rank, and besides what FSDP keeps gathered:
all of a small model, embedding and output matrix of a large one. Every teacher but the last costs one forward without
gradient over the guided prompts and targets.

An average is kept in float32: a step moves it by 1 - d of its distance from the policy. With d = 0.99 that is less than
2^-9 of the value, which bfloat16 rounds away, wherever the distance is below a fifth of the value, so that it would
stand still. A snapshot or a frozen copy in bfloat16 loses nothing but the rounding of the weights themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.policy import Policy


class Teacher:
    """The teacher of one rank.

    Attributes:
        copy: sharded, without gradient; None for `self` and `behaviour`.
        nbytes: of the copy, over all ranks.
    """

    def __init__(self, algorithm: Algorithm, copy: Policy | None) -> None:
        self._algorithm, self.copy = algorithm, copy
        # Now: what a forward has gathered is in the dtype that is computed in.
        self.nbytes = sum(p.numel() * p.element_size() for p in copy.parameters()) if copy else 0

    @property
    def moving(self) -> Policy | None:
        """The copy if it ever changes, so that a checkpoint has to hold it; `model.path` has the frozen one."""
        return None if self._algorithm.teacher == "frozen" else self.copy

    @property
    def matrix(self) -> Tensor | None:
        """The copy's output matrix, whole after its forward; None without a copy."""
        return self.copy.head if self.copy else None

    @torch.no_grad()
    def follow(self, policy: Policy, *, steps: int) -> None:
        """Take over of the policy what is due after `steps` optimiser steps in all. No communication."""
        share = self._share(steps)
        if self.copy is None or not share:
            return
        assert isinstance(self.copy, FSDPModule)
        self.copy.reshard()  # what was gathered of it is out of date
        for own, new in zip(self.copy.parameters(), policy.parameters(), strict=True):
            assert isinstance(own, DTensor)
            assert isinstance(new, DTensor)
            if share == 1:
                own.to_local().copy_(new.to_local())
            else:
                own.to_local().lerp_(new.to_local(), share)

    def _share(self, steps: int) -> float:
        """Of the policy's weights, in the copy after this step: 0 none, 1 all."""
        algorithm = self._algorithm
        if algorithm.teacher == "ema":
            return 1 - algorithm.teacher_decay
        return float(algorithm.teacher == "snapshot" and steps % algorithm.teacher_every == 0)
