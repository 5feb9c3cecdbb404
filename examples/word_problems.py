"""Small arithmetic stories with strategies, for a real language model that is as small as SmolLM2-135M.

    python examples/word_problems.py DIR [--count 512] [--warm-up 64] [--seed 0]

writes DIR/problems.jsonl for `tasks.path`, and DIR/warm-up.jsonl for `sgpo-async sft`, with the columns `problem`,
`answer`, `strategy` and `response` (docs/data.md). No text is in both files, or twice in one. The same arguments give
the same bytes.

    problem     Mia lost 4 stamps and has 5 stamps left. How many stamps did Mia have?
    strategy    Add the numbers: 5 + 4.
    response    Mia had 5 + 4 = 9 stamps.
    answer      9

Half of the problems tell what happened backwards, as this one, so that their words suggest the wrong operation. The
warm-up has none of these. A strategy names the operation and its numbers, which are all in the problem, and not the
result: `sgpo-async strategies check DIR/problems.jsonl` finds none that gives the answer away.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Eva")
THINGS = ("apples", "books", "pens", "stamps", "coins", "shells", "cards", "cups")
AS_IT_HAPPENS = ("gets", "loses", "bags", "places")
BACKWARDS = ("before loss", "before gain", "other has more", "other has less")  # "lost" and "less" ask for a sum
Record = dict[str, str]


def story(rng: random.Random, kinds: tuple[str, ...]) -> Record:
    """One problem of one of these kinds. The numbers that are added, multiplied or taken away are from 2 to 9."""
    (name, other), things, kind = rng.sample(NAMES, 2), rng.choice(THINGS), rng.choice(kinds)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    more = a + b
    added = ("Add the numbers", f"{a} + {b}", more)
    taken = ("Subtract the numbers", f"{more} - {b}", a)
    times = ("Multiply the numbers", f"{a} * {b}", a * b)
    ask, had = f"How many {things} does {name} have", f"How many {things} did {name} have?"
    problem, (plan, sum_, result) = {
        "gets": (f"{name} has {a} {things} and gets {b} more {things}. {ask} now?", added),
        "loses": (f"{name} has {more} {things} and loses {b} {things}. {ask} now?", taken),
        "bags": (f"{name} has {a} bags with {b} {things} in each bag. {ask}?", times),
        "places": (f"{name} has {a} {things} at home and {b} {things} at school. {ask}?", added),
        "before loss": (f"{name} lost {b} {things} and has {a} {things} left. {had}", added),
        "before gain": (f"{name} got {b} {things} and now has {more} {things}. {had}", taken),
        "other has more": (f"{other} has {more} {things}, {b} more than {name} has. {ask}?", taken),
        "other has less": (f"{other} has {a} {things}, {b} less than {name} has. {ask}?", added),
    }[kind]
    verb = "had" if kind.startswith("before") else "has"
    return {
        "problem": problem,
        "answer": str(result),
        "strategy": f"{plan}: {sum_}.",
        "response": f"{name} {verb} {sum_} = {result} {things}.",
    }


def stories(count: int, *, kinds: tuple[str, ...], seed: int) -> list[Record]:
    """`count` problems with different texts."""
    rng, found = random.Random(seed), dict[str, Record]()
    while len(found) < count:
        one = story(rng, kinds)
        found.setdefault(one["problem"], one)
    return list(found.values())


def write(folder: Path, *, count: int, warm_up: int, seed: int) -> None:
    """Write both files; those of the warm-up are stories as they happen, of which `problems.jsonl` has other ones."""
    problems = stories(count, kinds=AS_IT_HAPPENS + BACKWARDS, seed=seed)
    seen = {one["problem"] for one in problems}
    simple = stories(count + warm_up, kinds=AS_IT_HAPPENS, seed=seed + 1)
    parts = {
        "problems.jsonl": problems,
        "warm-up.jsonl": [one for one in simple if one["problem"] not in seen][:warm_up],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def main() -> int:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Small arithmetic stories with strategies.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=512, metavar="N", help="problems for a run (default: 512)")
    parser.add_argument("--warm-up", type=int, default=64, metavar="N", help="further problems for SFT (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems (default: 0)")
    args = parser.parse_args()
    if not (args.count >= 1 and args.warm_up >= 1 and args.count + args.warm_up <= 5_000):
        parser.error("--count and --warm-up must be >= 1, and together <= 5000, so that enough different stories exist")
    try:
        write(args.folder, count=args.count, warm_up=args.warm_up, seed=args.seed)
    except OSError as error:
        print(f"error: {error.filename}: cannot be written ({error.strerror}); name another folder", file=sys.stderr)
        return 2
    print(f"{args.folder}: {args.count} problems, {args.warm_up} for a warm-up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
