"""The learner's score of the canary under exactly the weights that it publishes (`model.canary`).

The published weights may be narrower than the learner's. Where its matrix products are narrower, too, FSDP gathers the
same rounded weights. Otherwise the shards are rounded for the one forward, and restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sgpo_async.learner.packing import Tokens, pack
from sgpo_async.learner.policy import Policy
from sgpo_async.model.canary import Canary


def canary_due(step: int, every: int) -> bool:
    """Whether the weights after `step` steps are scored: one of every `every` steps.

    Its place among them shifts, so that an engine that loads, for instance, every second version meets it.
    """
    return step % every == step // every % every


@dataclass(frozen=True, kw_only=True)
class CanaryScore:
    """Scores the canary with one policy."""

    policy: Policy
    canary: Canary
    dtype: torch.dtype  # of what is published
    bfloat16: bool  # whether matrix products are in bfloat16

    def __call__(self) -> np.ndarray:
        """The log-probabilities of the canary's tokens, [T] float32. A collective of all ranks.

        The parameters are sharded afterwards, with the values that they had before.
        """
        policy, canary = self.policy, self.canary
        packed = pack([Tokens(canary.prompt, canary.tokens)])
        assert isinstance(policy, FSDPModule)
        policy.reshard()  # what a root keeps gathered is of the step before, or not rounded
        with self._rounded():
            # Waits for the end: shards in the host's memory are restored at once, not in the order of a GPU's stream.
            logprobs: np.ndarray = policy.log_probabilities(packed, 1.0).float().cpu().numpy()
        policy.reshard()
        return logprobs

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """Round this rank's shards to what is published, and restore them."""
        kept: list[tuple[Tensor, Tensor]] = []
        if not self.bfloat16:
            for parameter in self.policy.parameters():
                assert isinstance(parameter, DTensor)
                local = parameter.to_local().detach()
                if parameter.requires_grad and local.dtype.itemsize > self.dtype.itemsize:
                    kept.append((local, local.clone()))
                    local.copy_(local.to(self.dtype))
        try:
            yield
        finally:
            for local, own in kept:
                local.copy_(own)
