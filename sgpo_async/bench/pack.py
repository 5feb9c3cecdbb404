"""Padding, and how long ranks wait for each other: the learner's rows and their division against naive ones.

    sgpo-async bench pack [--quick] [--run FOLDER] [--to DIR]

    padded                 sequences go to the ranks in turn; micro-batches of four, padded to the longest of each
    padded, sorted         the same, and each rank sorts its sequences by length first
    packed                 sequences go to the ranks in turn; each rank packs them one after another into rows
    packed, whole groups   each rank has whole groups, about as many tokens as the others (`hub.balance`)
    packed, divided        what the learner does: rows of equal work for all ranks (`learner.division`)

A micro-batch has the same memory in all of them: room for four of the longest sequences. Lengths are lognormal, or
those that the run in FOLDER has recorded; half of their variance belongs to the problem. Nothing is trained: time is
taken as proportional to the FLOPs of a 7B model, and ranks wait for each other after each micro-batch, as FSDP lets
them. Padding is computed like any other token. Prompts that sequences share are counted each time.

    wasted       share of the computed positions that are padding
    max/mean     time of a step, over the time if its work were divided evenly: 1 if no rank waits
    time/ideal   time of a step, over the time of the sequences alone divided evenly: both together
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_async.bench.division import GROUP, PROBLEMS, PROMPT, QWEN_7B, by_groups
from sgpo_async.bench.figures import columns, header, interval, load, machine, publish, spread, versions
from sgpo_async.bench.overlap import LONG, SHORT
from sgpo_async.errors import SgpoError
from sgpo_async.learner.division import Piece, Round, divide
from sgpo_async.metrics import read_samples
from sgpo_async.simulation import Lengths
from sgpo_async.simulation.workload import Workload, recorded_lengths

RANKS, QUICK_RANKS = (2, 8, 32), (8,)
STEPS, QUICK_STEPS = 20, 3
LONGEST_PER_MICRO_BATCH = 4
BAR = 1.02  # time/ideal of the learner's way, at most
OURS = "packed, divided"
NO_RUN = "recorded lengths were not measured: --run FOLDER names a run that has recorded some (learner.samples)"


class Batch(NamedTuple):
    """The sequences of a step, and what a micro-batch can hold."""

    lengths: list[int]  # of sequences, prompt included
    longest: int  # of any sequence

    @property
    def row_tokens(self) -> int:
        """Capacity of a micro-batch."""
        return LONGEST_PER_MICRO_BATCH * self.longest

    @property
    def pieces(self) -> list[Piece]:
        """The sequences as the division sees them."""
        return [Piece(length, work(length)) for length in self.lengths]


class Step(NamedTuple):
    """What a way of division costs."""

    wasted: float
    over_mean: float
    over_ideal: float


def run_bench_pack(*, quick: bool, run: str, to: Path) -> int:
    """Divide simulated steps in every way; print the table, write pack.txt and pack.json into `to`.

    Args:
        run: folder of a run whose recorded lengths are measured, too; "": none.

    Raises SgpoError if that run has recorded none.
    """
    before = load()
    lengths = {"lognormal, to 16,384": LONG, "lognormal, to 4,096": SHORT}
    if run:
        lengths["recorded"] = recorded(run)
    steps = QUICK_STEPS if quick else STEPS
    rows = []
    for name, own in lengths.items():
        for ranks in QUICK_RANKS if quick else RANKS:
            print(f"dividing {name} over {ranks} ranks ...", file=sys.stderr, flush=True)
            rows += measure(name, own, ranks=ranks, steps=steps)
    report = {
        "machine": machine(),
        "versions": versions("numpy"),
        "load": [before, load()],
        "steps": steps,
        "rows": rows,
        "missing": "" if run else NO_RUN,
    }
    publish("pack", to, table(report), report)
    return 0


def recorded(folder: str) -> Lengths:
    """The lengths of a run. Raises SgpoError if it has none."""
    found = recorded_lengths(read_samples(folder))
    if not found:
        raise SgpoError(f"--run {folder}: has no recorded completions (samples.jsonl); train with learner.samples >= 1")
    return Lengths(longest=max(found), recorded=found)


def measure(name: str, lengths: Lengths, *, ranks: int, steps: int) -> list[dict[str, Any]]:
    """Median and interval over the steps of each way's costs."""
    batches = [batch_of(lengths, seed=seed) for seed in range(steps)]
    found = []
    for way, divided in WAYS.items():
        costs = [divided(batch, ranks) for batch in batches]
        figures = {key: spread([getattr(one, key) for one in costs]) for key in Step._fields}
        found.append({"lengths": name, "ranks": ranks, "way": way} | figures)
    return found


def batch_of(lengths: Lengths, *, seed: int) -> Batch:
    """The sequences of one step: PROBLEMS groups of GROUP rollouts."""
    workload = Workload(lengths, size=GROUP, seed=seed)
    drawn = [PROMPT + workload.length(task, slot) for task in range(PROBLEMS) for slot in range(GROUP)]
    return Batch(drawn, PROMPT + lengths.longest)


def work(length: int) -> float:
    """FLOPs of a sequence, forward and backward; all tokens after the prompt are trained."""
    return 3 * QWEN_7B.forward(length=length, targets=length - PROMPT)


def padded(batch: Batch, ranks: int, *, by_length: bool) -> Step:
    """Sequences in turn, in padded micro-batches of a constant number."""
    computed, rounds = 0, []
    for rank in range(ranks):
        own = batch.lengths[rank::ranks]
        own = sorted(own) if by_length else own
        micro_batches = [own[i : i + LONGEST_PER_MICRO_BATCH] for i in range(0, len(own), LONGEST_PER_MICRO_BATCH)]
        computed += sum(len(one) * max(one) for one in micro_batches)
        rounds.append([len(one) * work(max(one)) for one in micro_batches])
    return _step(batch, computed, list(zip_longest(*rounds, fillvalue=0.0)))


def packed(batch: Batch, ranks: int) -> Step:
    """Sequences in turn, one after another in rows."""
    rounds = []
    for rank in range(ranks):
        rows, free = [0.0], batch.row_tokens
        for length in batch.lengths[rank::ranks]:
            if length > free:
                rows.append(0.0)
                free = batch.row_tokens
            rows[-1] += work(length)
            free -= length
        rounds.append(rows)
    return _step(batch, sum(batch.lengths), list(zip_longest(*rounds, fillvalue=0.0)))


def whole_groups(batch: Batch, ranks: int) -> Step:
    """Groups as the hub deals them, in rows of equal work within each rank."""
    return _of_rounds(batch, by_groups(batch.pieces, ranks, row_tokens=batch.row_tokens))


def divided(batch: Batch, ranks: int) -> Step:
    """The learner's division."""
    return _of_rounds(batch, divide(batch.pieces, ranks=ranks, row_tokens=batch.row_tokens))


WAYS: dict[str, Callable[[Batch, int], Step]] = {
    "padded": lambda batch, ranks: padded(batch, ranks, by_length=False),
    "padded, sorted": lambda batch, ranks: padded(batch, ranks, by_length=True),
    "packed": packed,
    "packed, whole groups": whole_groups,
    OURS: divided,
}


def _of_rounds(batch: Batch, rounds: Sequence[Round]) -> Step:
    pieces = batch.pieces
    spent = [[sum(pieces[i].work for i in own) for own in round_] for round_ in rounds]
    return _step(batch, sum(batch.lengths), spent)


def _step(batch: Batch, computed: int, rounds: Sequence[Sequence[float]]) -> Step:
    """The figures of a step from its computed positions and the work of each rank in each round."""
    wall = sum(map(max, rounds))
    ranks = len(rounds[0])
    return Step(
        wasted=1 - sum(batch.lengths) / computed,
        over_mean=wall * ranks / sum(map(sum, rounds)),
        over_ideal=wall * ranks / sum(map(work, batch.lengths)),
    )


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    steps = report["steps"]
    lines = header(
        report,
        f"steps of {PROBLEMS} problems of {GROUP} rollouts; median (least..most) of {steps} steps, "
        f"seeds 0 to {steps - 1}; bar of {OURS}: time/ideal at most {BAR:g}",
    )
    rows = [["lengths, ranks, way", "wasted", "max/mean", "time/ideal", ""]]
    for row in report["rows"]:
        missed = row["way"] == OURS and row["over_ideal"]["median"] > BAR
        rows.append(
            [
                f"{row['lengths']}, {row['ranks']} ranks: {row['way']}",
                interval(row["wasted"], ".0%"),
                interval(row["over_mean"], ".3f"),
                interval(row["over_ideal"], ".3f"),
                "missed" if missed else "",
            ]
        )
    return [*lines, "", *columns(rows), *(["", report["missing"]] if report["missing"] else [])]
