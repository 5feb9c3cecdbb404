"""`sgpo-async samples`: completions of a run, as samples.jsonl has them, also while the run goes on.

    sgpo-async samples runs/demo                       the newest group
    sgpo-async samples runs/demo --last 5 --unsolved   the newest five groups that the policy alone did not solve
    sgpo-async samples runs/demo --step 40 --problem "add"
    sgpo-async samples runs/demo --last 3 --distilled  the newest three in which a completion is distilled
    sgpo-async samples runs/demo --last 50 --html      a page with alone and guided side by side: runs/demo/samples.html

At 120 columns and more, the completions with the strategy are beside those without it, else below them.
Tokens of distilled completions are highlighted by the divergence between the guided and the unguided distribution:
yellow from 0.1 nats, red from 1. Tokens that are not distilled, although their completion is, are struck through.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgpo_async.errors import SgpoError

CHARS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, which groups of it (step, last, problem, solved, distilled), and how they are shown (chars, width, html)."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of the run, e.g. runs/demo")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the groups of this step")
    which.add_argument("--last", type=int, default=1, metavar="K", help="the newest K groups (default: 1)")
    parser.add_argument("--problem", default="", metavar="TEXT", help="only problems that contain TEXT")
    outcome = parser.add_mutually_exclusive_group()
    outcome.add_argument("--solved", action="store_true", help="only if a rollout without the strategy is correct")
    outcome.add_argument("--unsolved", action="store_true", help="only if none is")
    parser.add_argument("--distilled", action="store_true", help="only groups with a completion that is distilled")
    parser.add_argument(
        "--chars", type=int, default=CHARS, metavar="N", help=f"of each completion; 0: all (default: {CHARS})"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--width", type=int, metavar="N", help="columns (default: the terminal's; 80 in a pipe)")
    where.add_argument(
        "--html",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write a page in place of text (default: samples.html in RUN)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the groups. Raises SgpoError if there are none."""
    from rich.console import Console

    from sgpo_async.cli.sample_text import LEGEND, render
    from sgpo_async.files import write_whole
    from sgpo_async.metrics.samples import SAMPLES, read_samples
    from sgpo_async.report.completions import samples_page

    for name, least in (("last", 1), ("chars", 0), ("width", 40)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise SgpoError(f"--{name} must be >= {least}, got {value}")
    path = args.folder / SAMPLES
    samples = read_samples(args.folder)
    if not samples:
        raise SgpoError(f"{path}: no samples; they are written after the first step, unless learner.samples=0")
    found = [sample for sample in samples if _fits(sample, args)]
    if not found:
        raise SgpoError(f"{path}: none of {len(samples)} groups fits; {_steps(samples)}")
    chosen = found if args.step is not None else found[-args.last :]
    if args.html is not None:
        page = args.html if args.html != Path() else args.folder / "samples.html"
        write_whole(page, samples_page(args.folder.resolve().name, chosen, chars=args.chars))
        print(f"{len(chosen)} {'group' if len(chosen) == 1 else 'groups'}: {page}")
        return 0
    console = Console(markup=False, emoji=False, highlight=False, width=args.width)
    for sample in chosen:
        console.print(render(sample, chars=args.chars))
    if any(_distilled(sample) for sample in chosen):
        if console.color_system is not None:
            console.print(LEGEND, style="dim")
    elif any(_distilled(sample) for sample in samples):
        console.print("No completion here is distilled; those that are: --distilled", style="dim")
    return 0


def _fits(sample: Mapping[str, Any], args: argparse.Namespace) -> bool:
    """Whether a group is asked for."""
    from sgpo_async.report.texts import solved

    if args.step is not None and sample["step"] != args.step:
        return False
    if args.problem.lower() not in str(sample.get("problem")).lower():
        return False
    if args.distilled and not _distilled(sample):
        return False
    alone = solved(sample)[0] > 0
    return alone if args.solved else not alone if args.unsolved else True


def _distilled(sample: Mapping[str, Any]) -> bool:
    """Whether a completion of the group is distilled."""
    return any("kl" in rollout for rollout in sample["rollouts"])


def _steps(samples: Sequence[Mapping[str, Any]]) -> str:
    """Which steps there are."""
    steps = sorted({sample["step"] for sample in samples})
    if len(steps) == 1:
        return f"there are groups of step {steps[0]}"
    every = steps[1] - steps[0]
    return f"there are groups of the steps {steps[0]} to {steps[-1]}" + (f", one in {every}" if every > 1 else "")
