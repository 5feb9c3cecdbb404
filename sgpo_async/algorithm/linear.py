"""Losses of tokens directly from hidden states and the output matrix, without holding all logits.

The logits [T, V] are the largest tensor of training (16K x 152K in float32: 10 GB). `linear_loss` computes them chunk
by chunk, and accumulates the loss's gradients with respect to hidden and weight in the same pass, so that the backward
pass only scales them. Each token has one value v_t (log pi or a divergence), a function of its logits z_t:

    d loss / d z_t = c_t slope_t,    c_t = d loss / d v_t,    slope_t = d v_t / d z_t

Autograd computes c_t from the loss, which stays an ordinary function of all values. The slopes have closed forms, with
q = softmax(z):

    LogProbability      d log q(o_t) / d z = onehot(o_t) - q
    TeacherDivergence   see `divergences`
    TopDivergence       d log q(rest) / d z_v = [v in rest] q_v / q(rest) - q_v, and the chain rule

If top-p or top-k truncated the sampling, q of LogProbability is renormalised over the tokens that were kept (`Kept`):
the others have probability 0 and slope 0, for whatever weights.

After a chunk, the values up to its last token are known. If c_t depends on these alone, one pass is enough: 3 large
products (4 with a teacher), as with all logits at once. Otherwise (`Part.whole`) a first pass computes the values and a
second one the logits again: 4 (6). The values that are still missing are NaN, so a wrong `whole` gives NaN gradients,
unless the loss ignores NaN.

Logits are computed in the type of the inputs; softmax, values and slopes in float32 or wider. The gradient of weight is
accumulated in float32 or wider, and held from here to the backward pass. Weights are plain tensors; for a sharded
parameter, pass the gathered tensor.

Matrix products are torch's. So is the elementwise work of a block, except on CUDA, where `linear_triton` has kernels
for it, which read the logits once for the values and once for the slopes; TopDivergence, the clipped forward KL and
float64 have none. Speed and memory are measured on a CPU only (`sgpo_async.bench.loss`); nothing has run on a GPU, and
its sizes of chunks and blocks are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgpo_async.algorithm.divergences import divergence_of, top_divergence

Loss = Callable[[Tensor, Tensor], Tensor]
"""(values [T], asides [T]) -> the loss, a scalar with gradient in the values."""


class Sizes(NamedTuple):
    """How many logits are held at a time (a chunk), and how many one elementwise operation takes (a block)."""

    chunk: int
    block: int


# 263 rows of a vocabulary of 152K, 160 MB in float32; a block's intermediate results stay in the processor's cache.
CPU_SIZES = Sizes(40_000_000, 2**18)
# A GPU needs larger matrices: adding to the gradient of weight costs the same memory traffic for any number of rows.
GPU_SIZES = Sizes(160_000_000, 2**25)


class Block(NamedTuple):
    """Values of B tokens."""

    value: Tensor  # [B]
    aside: Tensor  # [B], another result of the same logits, never with gradient
    write_slope: Callable[[], object]  # overwrites the logits [B, V] by d value / d (logits / temperature)


BlockFunction = Callable[[Tensor, slice], Block]
"""(the student's logits [B, V], the block's rows within the chunk) -> Block."""


class Measure(Protocol):
    """What is computed from the logits of each of T tokens."""

    def __len__(self) -> int:
        """T."""

    def chunk(self, rows: slice, weight: Tensor, temperature: float) -> BlockFunction:
        """Prepare these rows; `weight` is the student's output matrix."""


@dataclass(frozen=True)
class Kept:
    """The tokens beside the target that truncated sampling kept at each of T positions. On the CPU."""

    others: np.ndarray  # [sum of sizes] int32, position by position
    sizes: np.ndarray  # [T] int32

    def table(self, rows: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return all kept tokens of C rows, the target first: ids [C, 1 + K] int64, and which of them are padding."""
        sizes, start = self.sizes[rows], int(self.sizes[: rows.start].sum())
        present = np.arange(sizes.max(initial=0)) < sizes[:, None]
        others = np.zeros(present.shape, np.int64)
        others[present] = self.others[start : start + int(sizes.sum())]
        ids, padding = (torch.from_numpy(array).to(targets.device) for array in (others, ~present))
        return torch.cat((targets[:, None], ids), 1), torch.nn.functional.pad(padding, (1, 0))


@dataclass(frozen=True)
class LogProbability:
    """log pi(o_t|.) of given tokens; beside it the entropy of pi, in nats."""

    targets: Tensor  # [T] int64, o_t
    kept: Kept | None = None  # pi is renormalised over these tokens; None: over the vocabulary

    def __len__(self) -> int:
        return len(self.targets)

    def chunk(self, rows: slice, _weight: Tensor, temperature: float) -> BlockFunction:
        """See `Measure`."""
        targets = self.targets[rows]
        if self.kept:
            return _log_probability_of_kept(*self.kept.table(rows, targets), temperature)

        def block(logits: Tensor, part: slice) -> Block:
            if kernels := _kernels(logits):
                return Block(*kernels.log_probability(logits, targets[part], temperature))
            log_q, own = _log_softmax(logits, temperature), targets[part, None]
            q = log_q.exp()
            value, entropy = log_q.gather(-1, own).squeeze(-1), -(q * log_q).sum(-1)
            one = torch.ones_like(value)[:, None]
            return Block(value, entropy, lambda: logits.copy_(q.neg_().scatter_add_(-1, own, one)))

        return block


@dataclass(frozen=True)
class TeacherDivergence:
    """d_t of Eq. 3 over the whole vocabulary; beside it the teacher's log-probability of the target tokens.

    No gradient reaches the teacher.
    """

    hidden: Tensor  # [T, H'], the teacher's hidden states, with the strategy in the prompt
    weight: Tensor | None  # [V, H'], the teacher's output matrix; None for the student's
    targets: Tensor  # [T] int64, o~_t
    kind: str = "forward"  # a key of DIVERGENCES
    kept: Kept | None = None  # the teacher's log-probability, but not d_t, is renormalised over these tokens
    clip: float = math.inf  # of each term of the forward KL, see `clipped_forward`

    def __len__(self) -> int:
        return len(self.targets)

    def chunk(self, rows: slice, weight: Tensor, temperature: float) -> BlockFunction:
        """See `Measure`."""
        teacher_logits = self.hidden[rows] @ (weight if self.weight is None else self.weight).T
        targets, (distance, slope) = self.targets[rows], divergence_of(self.kind, self.clip)
        if self.kept:
            ids, padding = self.kept.table(rows, targets)
            renormalised = _kept_log_softmax(teacher_logits, ids, padding, temperature)[:, 0]

        def log_teacher(whole: Tensor, part: slice) -> Tensor:
            return renormalised[part] if self.kept else whole

        def block(logits: Tensor, part: slice) -> Block:
            if self.clip == math.inf and (kernels := _kernels(logits, teacher_logits)):
                found = Block(*kernels.divergence(teacher_logits[part], logits, targets[part], self.kind, temperature))
                return found._replace(aside=log_teacher(found.aside, part))
            log_p, log_q = (_log_softmax(x, temperature) for x in (teacher_logits[part], logits))
            aside = log_teacher(log_p.gather(-1, targets[part, None]).squeeze(-1), part)
            return Block(distance(log_p, log_q), aside, lambda: logits.copy_(slope(log_p, log_q)))

        return block


@dataclass(frozen=True)
class TopDivergence:
    """`top_divergence` from a teacher's k most likely tokens and the rest; beside it its given log-probabilities."""

    tokens: Tensor  # [T, k] int64, k < V; the tokens of one row are distinct
    log_p: Tensor  # [T, k], the teacher's log-probabilities of these tokens
    log_targets: Tensor  # [T], the teacher's log-probabilities of the target tokens
    kind: str = "forward"  # a key of DIVERGENCES

    def __len__(self) -> int:
        return len(self.tokens)

    def chunk(self, rows: slice, _weight: Tensor, temperature: float) -> BlockFunction:
        """See `Measure`."""
        tokens, log_p, log_targets = self.tokens[rows], self.log_p[rows], self.log_targets[rows]

        def block(logits: Tensor, part: slice) -> Block:
            top, log_q = tokens[part], _log_softmax(logits, temperature)
            listed, rest = log_q.gather(-1, top), log_q.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
            log_top = torch.cat((listed, rest), -1).requires_grad_()
            with torch.enable_grad():
                d = top_divergence(log_p[part].to(log_q.dtype), log_top, kind=self.kind)

            def write_slope() -> None:
                (grad,) = torch.autograd.grad(d, log_top, torch.ones_like(d))
                within_rest = (log_q - rest).exp_().scatter_(-1, top, 0)
                slope = within_rest * grad[:, -1:] - log_q.exp_() * grad.sum(-1, keepdim=True)
                logits.copy_(slope.scatter_add_(-1, top, grad[:, :-1]))

            return Block(d.detach(), log_targets[part], write_slope)

        return block


@dataclass(frozen=True)
class Part:
    """Consecutive tokens that share a loss. A plain class: FSDP casts the tensors of tuples to its own precision."""

    measure: Measure
    loss: Loss
    whole: bool = False  # whether d loss / d v_t depends on values after t; it costs a second pass


class Found(NamedTuple):
    """The results of one part, without gradient."""

    loss: Tensor  # a scalar
    value: Tensor  # [T]
    aside: Tensor  # [T]


def linear_loss(
    hidden: Tensor, weight: Tensor, parts: Sequence[Part], *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, list[Found]]:
    """Compute the sum of the parts' losses from the logits hidden @ weight.T, without holding all of them.

    Args:
        hidden: [T, H], the positions that predict the tokens of all parts, one part after another.
        weight: [V, H].
        parts: of T tokens together.
        temperature: the sampling temperature of the rollouts; q = softmax(logits / temperature).
        chunk: rows of logits computed at a time; by default as many as the device's `Sizes` allow.

    Returns:
        the loss, a scalar that is differentiable once in hidden and weight, with one backward pass; the results of each
        part.
    """
    chunk = chunk or max(_sizes(weight).chunk // len(weight), 1)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, *flat = _LinearLoss.apply(hidden, weight, parts, temperature, chunk, differentiable)
    return total, [Found(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        hidden, weight, parts, temperature, chunk, differentiable = args
        sizes = [len(part.measure) for part in parts]
        assert sum(sizes) == len(hidden), f"the parts must have {len(hidden)} tokens together, got {sum(sizes)}"
        wide = _at_least_float32(hidden)
        logits = hidden.new_empty(min(chunk, len(hidden)), len(weight))
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if differentiable:
            grad_weight = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        found = [
            _Evaluation(
                part,
                _Head(own, weight, temperature, logits),
                _Gradients(grad_own, grad_weight) if differentiable else None,
            ).run()
            for part, own, grad_own in zip(parts, hidden.split(sizes), grad_hidden.split(sizes), strict=True)
        ]
        flat = [tensor for own in found for tensor in own]
        ctx.mark_non_differentiable(*flat)
        return sum((own.loss for own in found), hidden.new_zeros((), dtype=wide)), *flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because the matrix is large; autograd raises an error in a second backward pass.
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden.mul_(grads[0])
        grad_weight = None if grad_weight is None else grad_weight.mul_(grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _Head(NamedTuple):
    hidden: Tensor  # [T, H], of one part
    weight: Tensor  # [V, H]
    temperature: float
    logits: Tensor  # [C, V], overwritten by each chunk


class _Gradients(NamedTuple):
    hidden: Tensor  # [T, H], of one part
    weight: Tensor | None  # [V, H], of all parts so far, in float32 or wider; None if the matrix is not trained


class _Evaluation:
    """The evaluation of one part."""

    def __init__(self, part: Part, head: _Head, gradients: _Gradients | None) -> None:
        """`gradients` are None if none are wanted."""
        self._part, self._head, self._gradients = part, head, gradients
        size, dtype = (len(part.measure),), _at_least_float32(head.hidden)
        self._value, self._aside = (head.hidden.new_full(size, torch.nan, dtype=dtype) for _ in range(2))

    def run(self) -> Found:
        """Compute the values and the loss, and add the gradients."""
        with_gradients = self._gradients is not None
        one_pass = with_gradients and not self._part.whole
        for rows in self._chunks():
            slopes = self._measure(rows, with_slopes=one_pass)
            if one_pass:
                self._add_gradients(rows, slopes, self._loss_and_coefficients()[1][rows])
        if not with_gradients:
            return Found(self._part.loss(self._value, self._aside), self._value, self._aside)
        loss, coefficients = self._loss_and_coefficients()
        for rows in self._chunks() if self._part.whole else ():
            self._add_gradients(rows, self._measure(rows, with_slopes=True), coefficients[rows])
        return Found(loss, self._value, self._aside)

    def _measure(self, rows: slice, *, with_slopes: bool) -> Tensor:
        """Compute value and aside of these rows; return their slopes, or an undefined tensor without them: [C, V]."""
        hidden, weight, temperature, logits = self._head
        hidden = hidden[rows]
        logits = torch.mm(hidden, weight.T, out=logits[: len(hidden)])
        value, aside = self._value[rows], self._aside[rows]
        function = self._part.measure.chunk(rows, weight, temperature)
        for block in _slices(len(logits), max(_sizes(weight).block // len(weight), 1)):
            value[block], aside[block], write_slope = function(logits[block], block)
            if with_slopes:
                write_slope()
        return logits

    def _loss_and_coefficients(self) -> tuple[Tensor, Tensor]:
        """Compute the loss and c_t from the values so far."""
        with torch.enable_grad():
            value = self._value.detach().requires_grad_()
            loss = self._part.loss(value, self._aside)
            (coefficients,) = torch.autograd.grad(loss, value)
        return loss.detach(), coefficients

    def _add_gradients(self, rows: slice, slopes: Tensor, coefficients: Tensor) -> None:
        """Add the gradients of these rows, whose slopes are [C, V] and coefficients [C]."""
        assert self._gradients
        hidden, grad_hidden, grad_weight = self._head.hidden[rows], *self._gradients
        scale = (coefficients / self._head.temperature)[:, None]
        grad_hidden[rows] = (slopes @ self._head.weight) * scale
        if grad_weight is None:
            return
        scaled = (hidden * scale).to(hidden.dtype)
        if grad_weight.dtype == hidden.dtype:
            grad_weight.addmm_(slopes.T, scaled)
        else:
            grad_weight += slopes.T @ scaled

    def _chunks(self) -> Iterator[slice]:
        return _slices(len(self._value), max(len(self._head.logits), 1))


def _log_probability_of_kept(ids: Tensor, padding: Tensor, temperature: float) -> BlockFunction:
    """`LogProbability` renormalised over the tokens `ids` [C, 1 + K], of which the target is the first."""

    def block(logits: Tensor, part: slice) -> Block:
        own, absent = ids[part], padding[part]
        log_q = _kept_log_softmax(logits, own, absent, temperature)
        slope = log_q.exp().neg_()
        entropy = (slope * log_q.masked_fill(absent, 0)).sum(-1)
        slope[:, 0] += 1
        return Block(log_q[:, 0], entropy, lambda: logits.zero_().scatter_add_(-1, own, slope.to(logits.dtype)))

    return block


def _kept_log_softmax(logits: Tensor, ids: Tensor, padding: Tensor, temperature: float) -> Tensor:
    """log softmax(z/T) over the tokens `ids` of each row, -inf in the padding: [C, 1 + K]."""
    own = logits.gather(-1, ids).to(_at_least_float32(logits)) / temperature
    return torch.log_softmax(own.masked_fill(padding, -torch.inf), dim=-1)


def _kernels(*logits: Tensor) -> ModuleType | None:
    """Return the module of Triton's kernels if they can take these logits."""
    if not all(x.is_cuda and _at_least_float32(x) == torch.float32 for x in logits):
        return None
    from sgpo_async.algorithm import linear_triton  # Triton comes with torch's builds for CUDA only

    return linear_triton


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.to(_at_least_float32(logits)) / temperature, dim=-1)


def _sizes(tensor: Tensor) -> Sizes:
    return CPU_SIZES if tensor.device.type == "cpu" else GPU_SIZES


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
