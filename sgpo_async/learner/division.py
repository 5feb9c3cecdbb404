"""Divides the sequences of a step over ranks and micro-batches, so that no rank waits for another.

    sequences of all ranks ─▶ divide ─▶ round 1: a micro-batch for each rank    as many tokens as fit into a row, and
                                        round 2: ...                            nearly the same work as on other ranks

Every forward is a collective of FSDP, so the ranks go through their micro-batches in step: a round takes as long as its
most expensive micro-batch. Work is counted in FLOPs (`Cost`), because attention makes a token of a long sequence more
expensive than one of a short sequence. The long sequences share the first rounds. Each round is filled up to one level
with the largest sequences that fit, so that short ones are left to even out the last round.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from sgpo_async.learner.process_group import exchange

Round = list[list[int]]  # of each rank, the ascending indices of the pieces of its micro-batch
Item = TypeVar("Item")


class Piece(NamedTuple):
    """What the division knows of one sequence."""

    tokens: int  # positions in a row
    work: float  # FLOPs of its forward and backward passes
    teacher_work: float = 0.0  # FLOPs of its teacher pass


@dataclass(frozen=True)
class Cost:
    """FLOPs of a model's forward pass."""

    body: float  # per position, in the matrices of the layers
    attention: float  # per squared length of a sequence, causal
    head: float  # per trained token, in the output matrix

    @classmethod
    def of(cls, model: PreTrainedModel) -> Cost:
        """The costs of this model, whose parameters may be sharded. A matrix costs 2 FLOPs per element and token."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings().weight
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]  # only looked up
        matrices = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
        body = sum(matrices.values()) - sum(matrices.get(key, 0) for key in {id(p) for p in [head, *tables]})
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(2.0 * body, 2.0 * config.num_hidden_layers * width, 2.0 * head.numel())

    def forward(self, *, length: int, targets: int) -> float:
        """FLOPs of the forward pass of one sequence with this many positions and trained tokens."""
        return self.body * length + self.attention * length**2 + self.head * targets


def divide(pieces: Sequence[Piece], *, ranks: int, row_tokens: int) -> list[Round]:
    """Divide the pieces into rounds of one micro-batch for each rank; there is at least one round.

    A micro-batch has at most `row_tokens` tokens, or else one piece. The number of rounds is the smallest with which
    the rule at the top of this module succeeds. The teacher passes, which come before the first round, are evened out
    by the choice of the rank for each micro-batch of a round.
    """
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i].work, i))
    # At least as many as the tokens need, and as the pieces need of which no two fit into one micro-batch.
    large = sum(2 * piece.tokens > row_tokens for piece in pieces)
    tokens = sum(min(piece.tokens, row_tokens) for piece in pieces)
    number = max(1, math.ceil(large / ranks), math.ceil(tokens / (ranks * row_tokens)))
    while (filled := _fill(pieces, order.copy(), (number, ranks), row_tokens)) is None:
        number += 1
    teacher_work, rounds = [0.0] * ranks, []
    for micro_batches in filled:
        round_: Round = [[] for _ in range(ranks)]
        most_first = sorted(micro_batches, key=lambda own: -own.teacher_work)
        for rank, own in zip(sorted(range(ranks), key=teacher_work.__getitem__), most_first, strict=True):
            round_[rank] = sorted(own.items)
            teacher_work[rank] += own.teacher_work
        rounds.append(round_)
    return rounds


def deal(own: Sequence[Item], pieces: Sequence[Piece], *, row_tokens: int) -> tuple[list[list[Item]], float]:
    """Divide the items of all ranks; return this rank's micro-batches and the imbalance. A collective of all ranks.

    Args:
        own: the items that this rank has; those that other ranks train are sent to them.
        pieces: the piece of each item.
        row_tokens: the capacity of a micro-batch.
    """
    every: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, list(pieces))
    whole = [piece for part in every for piece in part]
    rounds = divide(whole, ranks=len(every), row_tokens=row_tokens)
    first = sum(map(len, every[: dist.get_rank()]))
    outgoing = [
        {i: own[i - first] for round_ in rounds for i in round_[rank] if first <= i < first + len(own)}
        for rank in range(len(every))
    ]
    received = {i: item for part in exchange(outgoing) for i, item in part.items()}
    return [[received[i] for i in round_[dist.get_rank()]] for round_ in rounds], imbalance(whole, rounds)


def imbalance(pieces: Sequence[Piece], rounds: Sequence[Round]) -> float:
    """The share of the ranks' time in which they wait for others, if time is proportional to FLOPs."""
    work = [[sum(pieces[i].work for i in own) for own in round_] for round_ in rounds]
    phases = [*work, [sum(pieces[i].teacher_work for own in ranks for i in own) for ranks in zip(*rounds, strict=True)]]
    wall = sum(map(max, phases)) * len(rounds[0])
    return 1 - sum(map(sum, phases)) / wall if wall else 0.0


class _MicroBatch:
    """A micro-batch that is being filled."""

    def __init__(self, row_tokens: int) -> None:
        self.items: list[int] = []
        self.work = self.teacher_work = 0.0
        self.free = row_tokens

    def takes(self, piece: Piece) -> bool:
        """Whether there is room for the piece; an empty micro-batch has room for any."""
        return piece.tokens <= self.free or not self.items

    def add(self, index: int, piece: Piece) -> None:
        """Add the piece with this index."""
        self.items.append(index)
        self.work += piece.work
        self.teacher_work += piece.teacher_work
        self.free -= piece.tokens


def _fill(
    pieces: Sequence[Piece], order: list[int], shape: tuple[int, int], row_tokens: int
) -> list[list[_MicroBatch]] | None:
    """Fill `shape` = (rounds, ranks) micro-batches with the pieces, whose `order` is by work; None if they are too few.

    Empties `order`.
    """
    number, ranks = shape
    rounds, left = [], sum(piece.work for piece in pieces)
    for remaining in range(number, 1, -1):
        micro_batches = [_MicroBatch(row_tokens) for _ in range(ranks)]
        level = max(pieces[order[-1]].work if order else 0.0, left / (ranks * remaining))
        for own in micro_batches:
            while (at := _largest(pieces, order, own, level - own.work)) is not None:
                index = order.pop(at)
                own.add(index, pieces[index])
        left -= sum(own.work for own in micro_batches)
        rounds.append(micro_batches)
    last = [_MicroBatch(row_tokens) for _ in range(ranks)]
    for index in reversed(order):  # the most expensive first, each to the one with the least work (Graham, 1969)
        fitting = [own for own in last if own.takes(pieces[index])]
        if not fitting:
            return None
        min(fitting, key=lambda own: own.work).add(index, pieces[index])
    return [*rounds, last]


def _largest(pieces: Sequence[Piece], order: list[int], own: _MicroBatch, room: float) -> int | None:
    """The position in `order` of the most expensive piece of at most `room` FLOPs that `own` takes, if there is one."""
    at = bisect_right(order, room * (1 + 1e-9), key=lambda i: pieces[i].work) - 1
    return next((i for i in range(at, -1, -1) if own.takes(pieces[order[i]])), None)
