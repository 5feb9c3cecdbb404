"""One forward and backward of one loss: `python -m sgpo_async.bench.worker_loss LOSS WAY T V H` prints one JSON line.

cpu_s      CPU time of the process, in seconds
extra_gb   peak of the resident memory above that with the inputs alone, without the gradients of hidden and weight, in
           10^9 bytes; both gradients are subtracted even if they do not exist yet at the peak, as in the naive way
loss       the value
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sgpo_async.algorithm import DIVERGENCES, LogProbability, Part, TeacherDivergence, linear_loss


class Inputs(NamedTuple):
    """Random inputs; logits are standard normal."""

    hidden: Tensor  # [T, H], with gradient
    weight: Tensor  # [V, H], with gradient
    teacher: Tensor  # [T, H]
    targets: Tensor  # [T]


def inputs(tokens: int, vocabulary: int, width: int) -> Inputs:
    """Make inputs of these sizes, without temporary tensors, which would raise the peak."""
    hidden, weight, teacher = (torch.randn(rows, width) for rows in (tokens, vocabulary, tokens))
    weight.mul_(width**-0.5)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), teacher, torch.randint(vocabulary, (tokens,)))


def _naive_policy_gradient(x: Inputs) -> Tensor:
    return -(x.hidden @ x.weight.T).log_softmax(-1).gather(1, x.targets[:, None]).mean()


def _fused_policy_gradient(x: Inputs) -> Tensor:
    part = Part(LogProbability(x.targets), lambda log_pi, _: -log_pi.mean())
    return linear_loss(x.hidden, x.weight, [part])[0]


def _naive_distillation(x: Inputs) -> Tensor:
    log_p = (x.teacher @ x.weight.detach().T).log_softmax(-1)
    return DIVERGENCES["forward"].value(log_p, (x.hidden @ x.weight.T).log_softmax(-1)).mean()


def _fused_distillation(x: Inputs) -> Tensor:
    part = Part(TeacherDivergence(x.teacher, None, x.targets), lambda d, _: d.mean())
    return linear_loss(x.hidden, x.weight, [part])[0]


LOSSES: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "policy_gradient": {"naive": _naive_policy_gradient, "fused": _fused_policy_gradient},
    "distillation": {"naive": _naive_distillation, "fused": _fused_distillation},
}


def _liger_policy_gradient(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # One sequence with the advantage 1: the value is -1, as ratios to the present policy are 1; the gradient is ours.
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)
    mask, advantage = torch.ones(1, len(x.targets)), torch.ones(1)
    return loss(x.hidden[None], x.weight, x.targets[None], mask, advantage)[0]


def _liger_distillation(x: Inputs, *, chunk: int) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0}  # the forward divergence alone
    loss = LigerFusedLinearJSDLoss(**settings, chunk_size=chunk, compiled=False)
    return loss(x.hidden, x.weight, x.teacher, x.weight.detach(), x.targets)


# Liger's chunked losses: operations of torch, which run on CPUs, too; its Triton kernels do not.
LIGER: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "policy_gradient": {"liger": _liger_policy_gradient},
    "distillation": {
        "liger": partial(_liger_distillation, chunk=1024),  # its default
        "liger, 64 tokens": partial(_liger_distillation, chunk=64),
    },
}


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    loss, way, *sizes = argv
    function = (LOSSES[loss] | LIGER[loss])[way]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function(inputs(64, 64, 64)).backward()  # loads the kernels
    given = inputs(*map(int, sizes))
    before, began = _peak_bytes(), time.process_time()
    value = function(given)
    value.backward()
    seconds, extra = time.process_time() - began, _peak_bytes() - before
    gradients = sum(tensor.nbytes for tensor in (given.hidden, given.weight))
    print(json.dumps({"cpu_s": seconds, "extra_gb": (extra - gradients) / 1e9, "loss": value.item()}))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
