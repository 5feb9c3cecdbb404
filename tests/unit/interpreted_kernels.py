"""The kernels of `linear_triton` on a CPU, for tests: python -m tests.unit.interpreted_kernels FILE

Triton decides when it is imported whether kernels are compiled or interpreted, so this process writes the results of
all cases to FILE, and the test compares them with those of torch's operations.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import (
    DIVERGENCES,
    Kept,
    LogProbability,
    Part,
    TeacherDivergence,
    TopDivergence,
    linear,
    linear_loss,
)

ROWS = 3
LOG_PROBABILITY = "log-probability"
MEASURES = (LOG_PROBABILITY, *DIVERGENCES)
DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """Random logits of one block."""

    measure: str  # of MEASURES
    dtype: torch.dtype
    vocabulary: int
    spread: float  # standard deviation of the logits
    temperature: float


# One token, less than a block, exactly one block, and several of which the last is not full.
CASES = [
    Case(measure, dtype, vocabulary, spread, temperature)
    for measure in MEASURES
    for dtype in DTYPES
    for vocabulary in (1, 37, 4096, 9001)
    for spread, temperature in ((3.0, 1.0), (3.0, 0.7), (1e4, 0.7))
]


def random_logits(case: Case) -> tuple[Tensor, Tensor]:
    """Return the logits of teacher and student, [ROWS, V] each."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(ROWS, case.vocabulary, generator=generator) for _ in range(2))
    return (teacher * case.spread).to(case.dtype), (student * case.spread).to(case.dtype)


def block(case: Case, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value and aside [ROWS], and the slope [ROWS, V]; the logits are those of the case, in any type."""
    targets = torch.arange(ROWS) * 5 % case.vocabulary
    measure: linear.Measure = LogProbability(targets)
    if case.measure != LOG_PROBABILITY:
        measure = TeacherDivergence(torch.eye(ROWS).to(teacher), teacher.T.contiguous(), targets, case.measure)
    logits = student.clone()
    function = measure.chunk(slice(ROWS), torch.empty(0), case.temperature)
    value, aside, write_slope = function(logits, slice(ROWS))
    write_slope()
    return value, aside, logits


def losses(dtype: torch.dtype) -> list[Tensor]:
    """Return the loss of one part of each kind, all values and asides, and the gradients of hidden and weight."""
    tokens, width, vocabulary = 13, 6, 37
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens * (len(MEASURES) + 3), width), (vocabulary, width), (tokens, width))
    hidden, weight, guided = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    log_p = torch.full((tokens, 1), -1.0)
    measures: list[linear.Measure] = [LogProbability(targets), TopDivergence(targets[:, None], log_p, log_p[:, 0])]
    measures += [TeacherDivergence(guided, None, targets, kind) for kind in DIVERGENCES]
    # Truncated sampling: two other tokens were kept at every other position.
    others = (targets[::2, None] + torch.tensor([1, 2])) % vocabulary
    kept = Kept(others.flatten().numpy().astype(np.int32), np.array([2 * (1 - i % 2) for i in range(tokens)], np.int32))
    measures += [LogProbability(targets, kept), TeacherDivergence(guided, None, targets, "forward", kept)]
    parts = [
        Part(measure, lambda value, aside: (value.sin() + aside).sum(), whole=index % 2 == 0)
        for index, measure in enumerate(measures)
    ]
    for tensor in (hidden, weight):
        tensor.requires_grad_()
    sizes = linear.Sizes(chunk=5 * vocabulary, block=2 * vocabulary)  # neither divides the tokens
    with patch.object(linear, "CPU_SIZES", sizes):
        loss, found = linear_loss(hidden, weight, parts, temperature=0.7)
    results = [loss.detach(), *(tensor for own in found for tensor in own)]
    return [*results, *torch.autograd.grad(loss, (hidden, weight))]


def mixed_types(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the results of each divergence from a teacher in bfloat16, with the student in another type."""
    results = []
    for kind in DIVERGENCES:
        case = Case(kind, torch.bfloat16, 37, 3.0, 0.7)
        teacher, student = random_logits(case)
        results.append(block(case, teacher, student.to(dtype)))
    return results


def not_a_number() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the results of each measure for rows of which one has a NaN."""
    cases = [Case(measure, torch.float32, 37, 1.0, 1.0) for measure in MEASURES]
    results = []
    for case in cases:
        teacher, student = random_logits(case)
        student[1, 20] = torch.nan
        results.append(block(case, teacher, student))
    return results


def same_distribution() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the results of each divergence between equal logits."""
    cases = [Case(kind, torch.float32, 9001, 3.0, 0.7) for kind in DIVERGENCES]
    return [block(case, random_logits(case)[0], random_logits(case)[0]) for case in cases]


def main(path: str) -> None:
    """Save what the kernels compute."""
    os.environ["TRITON_INTERPRET"] = "1"
    from sgpo_async.algorithm import linear_triton

    def kernels(*logits: Tensor) -> object:
        return linear_triton if all(x.dtype != torch.float64 for x in logits) else None

    with patch.object(linear, "_kernels", kernels):
        results = {
            "blocks": [block(case, *random_logits(case)) for case in CASES],
            "losses": [losses(dtype) for dtype in DTYPES],
            "mixed types": mixed_types(torch.float32),
            "not a number": not_a_number(),
            "same distribution": same_distribution(),
        }
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
