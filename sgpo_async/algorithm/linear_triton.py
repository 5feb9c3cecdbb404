# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0913, PLR0917
# A kernel takes pointers and numbers one by one, and Triton has no types for them.
"""Values and slopes of `linear` by Triton kernels, for logits on a CUDA device.

    value kernel   one program per row of logits; writes the value, the aside, and the row's normalisers
    slope kernel   one program per block of a row; writes the slope over the logits

With torch's own operations, 6 to 15 intermediate results [B, V] go to memory and back, in float32. These kernels keep
them in registers. Logits are bfloat16, float16 or float32, and everything is computed in float32.

The normalisers of a row are its largest logit m and l = log sum_v exp(x_v), with x_v = (z_v - m) / temperature. Then
log q_v = x_v - l. They are kept apart, because in the sum m / temperature + l a large m would round l away.

The value kernel reads the logits once: it keeps the largest logit so far, and sums that are relative to it (online
softmax). A new maximum changes all x of the row by the same c. This changes s = sum exp(x) to e^c s, and
a = sum exp(x) x to e^c (a + c s). The entropy is l - a/s. The sum of KL(p || q), exp(x^p) (x^p - x^q), changes like a,
with the difference of the two rows' c. So one read is enough for both KL divergences. Jensen-Shannon needs a second
one: log (p_v + q_v)/2 is not a sum of a function of p and one of q, so l^p and l^q must be known first.

The tests run these kernels on a CPU, in Triton's interpreter. Nothing is measured on a GPU; BLOCK and WARPS are
estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program holds at a time, 16 per thread
WARPS = 8
LOWEST = tl.constexpr(-1e30)  # below every logit that occurs; -inf minus itself would be NaN
LOG_2 = tl.constexpr(0.6931471805599453)
FIELDS = tl.constexpr(4)  # what is kept of a row of logits: value, aside, m, l
PAIR_FIELDS = tl.constexpr(7)  # of the rows of both: value, aside, m^p, l^p, m^q, l^q, what the slope subtracts

Result = tuple[Tensor, Tensor, Callable[[], object]]
"""The fields of `linear.Block`: value [B], aside [B], and what writes the slope over the logits."""


def log_probability(logits: Tensor, targets: Tensor, temperature: float) -> Result:
    """Compute the block of `linear.LogProbability`: log q of the targets and the entropy of q, both [B] in nats.

    Args:
        logits: [B, V], contiguous; q = softmax(logits / temperature).
        targets: [B] int64.
        temperature: > 0.
    """
    rows = _rows(logits, FIELDS.value)
    arguments = (targets, rows, logits.shape[1], 1 / temperature, BLOCK)
    _launch(_log_probability_value, [logits], arguments, blocks=1)
    return rows[:, 0], rows[:, 1], lambda: _launch(_log_probability_slope, [logits], arguments, blocks=_blocks(logits))


def divergence(teacher_logits: Tensor, logits: Tensor, targets: Tensor, kind: str, temperature: float) -> Result:
    """Compute the block of `linear.TeacherDivergence`: d_t and log p of the targets, both [B] in nats.

    Args:
        teacher_logits: [B, V], contiguous; p = softmax(teacher_logits / temperature).
        logits: [B, V], contiguous; q = softmax(logits / temperature). The two may have different types.
        targets: [B] int64.
        kind: a key of DIVERGENCES.
        temperature: > 0.
    """
    assert kind in ("forward", "reverse", "jensen-shannon"), f"no kernel for the divergence {kind!r}"
    assert teacher_logits.shape == logits.shape
    rows, both = _rows(logits, PAIR_FIELDS.value), [teacher_logits, logits]
    scale = 1 / temperature
    value_arguments = (targets, rows, logits.shape[1], scale, kind, BLOCK)
    slope_arguments = (rows, logits.shape[1], scale, kind, BLOCK)
    _launch(_divergence_value, both, value_arguments, blocks=1)
    return rows[:, 0], rows[:, 1], lambda: _launch(_divergence_slope, both, slope_arguments, blocks=_blocks(logits))


def _rows(logits: Tensor, count: int) -> Tensor:
    """Make room for the results of each row: [B, count]."""
    return logits.new_empty(len(logits), count, dtype=torch.float32)


def _blocks(logits: Tensor) -> int:
    return triton.cdiv(logits.shape[1], BLOCK)


def _launch(kernel: Any, logits: Sequence[Tensor], arguments: Sequence[Any], *, blocks: int) -> None:
    """Run one program for each block of each row."""
    assert all(x.is_contiguous() for x in logits), "the logits must be contiguous"
    with torch.cuda.device_of(logits[0]):  # Triton launches on the current device
        kernel[(len(logits[0]), blocks)](*logits, *arguments, num_warps=WARPS)


@triton.jit
def _log_probability_value(logits, targets, rows, vocabulary, scale, BLOCK: tl.constexpr):
    """Write log q of the target, the entropy, and the normalisers m and l."""
    row = tl.program_id(0).to(tl.int64)  # its offset may exceed int32
    logits += row * vocabulary
    top, total, weighted = tl.full((), LOWEST, tl.float32), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        top, x, change = _read(logits, start, vocabulary, top, scale, BLOCK)
        e, shrink = tl.exp(x), tl.exp(change)
        weighted = shrink * (weighted + change * total) + _weighted_sum(e, x)
        total = shrink * total + tl.sum(e, 0)
    log_total = tl.log(total)
    own = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    rows += row * FIELDS
    tl.store(rows, (own - top) * scale - log_total)
    tl.store(rows + 1, log_total - weighted / total)
    tl.store(rows + 2, top)
    tl.store(rows + 3, log_total)


@triton.jit
def _log_probability_slope(logits, targets, rows, vocabulary, scale, BLOCK: tl.constexpr):
    """Write onehot(target) - q over the logits."""
    row = tl.program_id(0).to(tl.int64)  # its offset may exceed int32
    logits += row * vocabulary
    rows += row * FIELDS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.exp(_log_softmax(logits + at, at < vocabulary, tl.load(rows + 2), tl.load(rows + 3), scale))
    slope = tl.where(at == tl.load(targets + row), 1 - q, -q)
    tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < vocabulary)


@triton.jit
def _divergence_value(teacher, student, targets, rows, vocabulary, scale, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Write d, log p of the target, the normalisers of both rows, and the KL divergence that the slope subtracts."""
    row = tl.program_id(0).to(tl.int64)  # its offset may exceed int32
    teacher += row * vocabulary
    student += row * vocabulary
    top_p, total_p = tl.full((), LOWEST, tl.float32), 0.0
    top_q, total_q = tl.full((), LOWEST, tl.float32), 0.0
    weighted = 0.0  # the sum of exp(x^p) (x^p - x^q), or with p and q exchanged
    for start in range(0, vocabulary, BLOCK):
        top_p, x_p, change_p = _read(teacher, start, vocabulary, top_p, scale, BLOCK)
        top_q, x_q, change_q = _read(student, start, vocabulary, top_q, scale, BLOCK)
        e_p, shrink_p = tl.exp(x_p), tl.exp(change_p)
        e_q, shrink_q = tl.exp(x_q), tl.exp(change_q)
        if KIND == "forward":
            weighted = shrink_p * (weighted + (change_p - change_q) * total_p) + _weighted_sum(e_p, x_p - x_q)
        elif KIND == "reverse":
            weighted = shrink_q * (weighted + (change_q - change_p) * total_q) + _weighted_sum(e_q, x_q - x_p)
        total_p = shrink_p * total_p + tl.sum(e_p, 0)
        total_q = shrink_q * total_q + tl.sum(e_q, 0)
    log_p, log_q = tl.log(total_p), tl.log(total_q)
    if KIND == "forward":
        value = weighted / total_p + log_q - log_p
        centre = value
    elif KIND == "reverse":
        value = weighted / total_q + log_p - log_q
        centre = value
    else:
        value, centre = _jensen_shannon(teacher, student, top_p, log_p, top_q, log_q, vocabulary, scale, BLOCK)
    own = tl.load(teacher + tl.load(targets + row)).to(tl.float32)
    rows += row * PAIR_FIELDS
    tl.store(rows, value)
    tl.store(rows + 1, (own - top_p) * scale - log_p)
    tl.store(rows + 2, top_p)
    tl.store(rows + 3, log_p)
    tl.store(rows + 4, top_q)
    tl.store(rows + 5, log_q)
    tl.store(rows + 6, centre)


@triton.jit
def _jensen_shannon(teacher, student, top_p, log_p, top_q, log_q, vocabulary, scale, BLOCK: tl.constexpr):
    """Return the divergence and KL(q || m)."""
    from_p, from_q = 0.0, 0.0  # KL(p || m) and KL(q || m)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y_p = _log_softmax(teacher + at, at < vocabulary, top_p, log_p, scale)
        y_q = _log_softmax(student + at, at < vocabulary, top_q, log_q, scale)
        from_p += _weighted_sum(tl.exp(y_p), _log_over_mixture(y_p - y_q))
        from_q += _weighted_sum(tl.exp(y_q), _log_over_mixture(y_q - y_p))
    return (from_p + from_q) / 2, from_q


@triton.jit
def _divergence_slope(teacher, student, rows, vocabulary, scale, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Write the slope of `divergences` over the student's logits."""
    row = tl.program_id(0).to(tl.int64)  # its offset may exceed int32
    teacher += row * vocabulary
    student += row * vocabulary
    rows += row * PAIR_FIELDS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_p = _log_softmax(teacher + at, at < vocabulary, tl.load(rows + 2), tl.load(rows + 3), scale)
    y_q = _log_softmax(student + at, at < vocabulary, tl.load(rows + 4), tl.load(rows + 5), scale)
    q = tl.exp(y_q)
    if KIND == "forward":
        slope = q - tl.exp(y_p)
    elif KIND == "reverse":
        slope = q * (tl.where(q > 0, y_q - y_p, 0) - tl.load(rows + 6))
    else:
        slope = q * (tl.where(q > 0, _log_over_mixture(y_q - y_p), 0) - tl.load(rows + 6)) / 2
    tl.store(student + at, slope.to(student.dtype.element_ty), mask=at < vocabulary)


@triton.jit
def _read(logits, start, vocabulary, top, scale, BLOCK: tl.constexpr):
    """Return the largest logit so far, x of the next block relative to it, and the change c of all earlier x."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
    new = tl.maximum(top, tl.max(z, 0))
    return new, (z - new) * scale, (top - new) * scale


@triton.jit
def _log_softmax(pointers, mask, top, log_total, scale):
    """Return the log-probabilities of these tokens, and -inf outside of the mask."""
    return (tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32) - top) * scale - log_total


@triton.jit
def _weighted_sum(e, y):
    """Compute sum_v e_v y_v, with 0 times infinity = 0."""
    return tl.sum(tl.where(e > 0, e * y, 0), 0)


@triton.jit
def _log_over_mixture(y):
    """Compute log q/m for the mixture m = (p + q)/2 from y = log q/p, exactly 0 for p = q.

    log q/m = log 2 - log(1 + p/q) = log 2 - max(-y, 0) - log(1 + exp(-|y|))
    """
    return LOG_2 - tl.maximum(-y, 0) - tl.log(1 + tl.exp(-tl.abs(y)))
