"""How long ranks wait for each other in a step of long, uneven rollouts: whole groups against single sequences.

A simulation of steps of a 7B model: 128 problems of eight rollouts of lognormal length, 3 % of which are cut at 16,384
tokens. Time is taken as proportional to FLOPs. "Groups" leaves each group on one rank, as the hub deals them out by
tokens; "sequences" is what the learner does (`learner.division`). Neither has padding.

    python -m sgpo_async.bench.division [--ranks 6 32] [--steps 20]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from statistics import NormalDist

import numpy as np

from sgpo_async.hub.balance import balance
from sgpo_async.learner.division import Cost, Piece, Round, divide, imbalance

QWEN_7B = Cost(body=2 * 6.53e9, attention=2 * 28 * 3584, head=2 * 152_064 * 3584)
PROBLEMS, GROUP, ROW_TOKENS, PROMPT = 128, 8, 17_408, 100
LONGEST, CUT, SIGMA = 16_384, 0.03, 1.93  # the mean is about 1,500 tokens


def main() -> None:
    """Simulate and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[6, 32])
    parser.add_argument("--steps", type=int, default=20, help="steps to simulate, each with lengths of its own")
    args = parser.parse_args()
    found = []
    for ranks in args.ranks:
        steps = [simulate(np.random.default_rng(seed), ranks) for seed in range(args.steps)]
        for rule in steps[0]:
            waiting = [step[rule] for step in steps]
            figures = {"ranks": ranks, "rule": rule, "median": statistics.median(waiting), "worst": max(waiting)}
            found.append(figures)
            print(f"{ranks:3} ranks, {rule:10} waiting {figures['median']:6.2%}, at most {figures['worst']:6.2%}")
    print(json.dumps({"steps": args.steps, "waiting": found}))


def simulate(rng: np.random.Generator, ranks: int) -> dict[str, float]:
    """The share of the ranks' time spent waiting in one step, by rule."""
    completions = np.clip(rng.lognormal(location(LONGEST), SIGMA, PROBLEMS * GROUP), 8, LONGEST).astype(int)
    pieces = [
        Piece(int(length) + PROMPT, 3 * QWEN_7B.forward(length=int(length) + PROMPT, targets=int(length)))
        for length in completions
    ]
    sequences = divide(pieces, ranks=ranks, row_tokens=ROW_TOKENS)
    return {"groups": imbalance(pieces, by_groups(pieces, ranks)), "sequences": imbalance(pieces, sequences)}


def location(longest: int) -> float:
    """The mean of the logarithm of lognormal lengths of which the share CUT is longer than `longest`."""
    return float(np.log(longest)) - NormalDist().inv_cdf(1 - CUT) * SIGMA


def by_groups(pieces: Sequence[Piece], ranks: int, *, row_tokens: int = ROW_TOKENS) -> list[Round]:
    """Rounds in which each rank has the micro-batches of its own groups."""
    groups = [range(first, first + GROUP) for first in range(0, len(pieces), GROUP)]
    shares = balance([sum(pieces[i].tokens for i in group) for group in groups], ranks)
    own = []
    for share in shares:
        indices = [i for g in share for i in groups[g]]
        rounds = divide([pieces[i] for i in indices], ranks=1, row_tokens=row_tokens)
        own.append([[indices[i] for i in micro_batch] for (micro_batch,) in rounds])
    return [list(round_) for round_ in zip_longest(*own, fillvalue=[])]


if __name__ == "__main__":
    main()
