"""`sgpo-async data prepare`: split a user's problems into sets for warm-up, its validation and RL.

    sgpo-async data prepare FILE ... --out FOLDER --benchmark math500=FILE ...

It writes sft, sft-validation and rl as JSON Lines or Parquet; removed.jsonl, which lists the problems that are in none
of them, with reasons; and manifest.json, which is written last.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_async.errors import DataError

if TYPE_CHECKING:
    from sgpo_async.tasks.base import Problem
    from sgpo_async.tasks.prepare import Prepared, Removed, Rules
    from sgpo_async.tasks.records import Form

MANIFEST = "manifest.json"
REMOVED = "removed.jsonl"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file or dataset that was read."""

    facts: dict[str, Any]  # for the manifest
    problems: Sequence[Problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """prepare FILE ... --out FOLDER [...]."""
    parser.add_argument("action", choices=["prepare"], help="clean and split; the same seed gives the same files")
    parser.add_argument("files", metavar="FILE", nargs="+", help="JSONL, CSV, Parquet, or a Hugging Face dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="another name of a column, e.g. problem=question; may be repeated",
    )
    parser.add_argument(
        "--answer-after", default="", metavar="TEXT", help="the answer follows this text in its column, e.g. '####'"
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="an evaluation set, whose problems must not be trained on; may be repeated",
    )
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--sft-share",
        type=float,
        default=1 / 3,
        metavar="P",
        help="share of the problems for the warm-up (default: 1/3)",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        metavar="P",
        help="share of the warm-up set (default: %(default)s)",
    )
    parser.add_argument(
        "--duplicate-words", type=int, default=5, metavar="N", help="n-grams for near-duplicates (default: %(default)s)"
    )
    parser.add_argument(
        "--duplicate-overlap",
        type=float,
        default=0.8,
        metavar="P",
        help="share of n-grams that makes a near-duplicate (default: %(default)s)",
    )
    parser.add_argument(
        "--contamination-words",
        type=int,
        default=13,
        metavar="N",
        help="n-grams for --benchmark (default: %(default)s)",
    )
    parser.add_argument(
        "--contamination-overlap",
        type=float,
        default=0.0,
        metavar="P",
        help="a larger share of n-grams is contamination (default: any n-gram)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Read, prepare, write, and report what was done. Raises SgpoError."""
    from sgpo_async.tasks.prepare import Rules, prepare

    rules = Rules(
        seed=args.seed,
        sft_share=args.sft_share,
        validation_share=args.validation_share,
        duplicate_words=args.duplicate_words,
        duplicate_overlap=args.duplicate_overlap,
        contamination_words=args.contamination_words,
        contamination_overlap=args.contamination_overlap,
    )
    if not args.dry_run and (args.out / MANIFEST).exists():
        raise DataError(
            f"{args.out / MANIFEST}: it has results already; choose another --out folder, or remove this one"
        )
    form = form_of(args)
    sources = [read_source(path, form) for path in args.files]
    benchmarks = [read_benchmark(word) for word in args.benchmark]
    problems = [problem for source in sources for problem in source.problems]
    evaluation = [(one.facts["name"], problem) for one in benchmarks for problem in one.problems]
    prepared = prepare(problems, evaluation, rules)
    for line in report(prepared, sources, checked=bool(benchmarks)):
        print(line)
    print(unverified(prepared))
    if not args.dry_run:
        write(args.out, prepared, suffix=args.format, facts=facts_of(sources, benchmarks, rules))
        print(f"written: {args.out}")
    return 0


def read_source(path: str, form: Form) -> Source:
    """The problems of one file. Raises DataError."""
    from sgpo_async.tasks.rows import open_rows
    from sgpo_async.tasks.writing import COLUMNS, sha256

    rows = open_rows(path)
    problems, columns = [], set()
    for place, record in rows:
        problems.append(form.problem(place, record))
        columns |= record.keys()
    ignored = sorted(columns - set(COLUMNS) - set(form.columns.values()))
    digest = sha256(path, (record for _, record in rows))
    return Source(
        facts={"path": path, "sha256": digest, "problems": len(rows), "ignored_columns": ignored}, problems=problems
    )


def read_benchmark(word: str) -> Source:
    """The evaluation set of an argument NAME=FILE. Raises DataError."""
    from sgpo_async.tasks.benchmarks import open_benchmark
    from sgpo_async.tasks.rows import open_rows
    from sgpo_async.tasks.writing import sha256

    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise DataError(f"--benchmark {word!r}: must be NAME=FILE, e.g. math500=math500.jsonl")
    problems = open_benchmark(name, path, samples=1).problems
    digest = sha256(path, (record for _, record in open_rows(path)))
    return Source(facts={"name": name, "path": path, "sha256": digest, "problems": len(problems)}, problems=problems)


def form_of(args: argparse.Namespace) -> Form:
    """The form of the input that --column and --answer-after name. Raises DataError."""
    from sgpo_async.config.schema import COLUMNS
    from sgpo_async.tasks.records import Form

    columns = {}
    for word in args.column:
        ours, equals, theirs = word.partition("=")
        if ours not in COLUMNS or not (equals and theirs):
            raise DataError(f"--column {word!r}: must be OURS=THEIRS, with one of {', '.join(COLUMNS)} as OURS")
        columns[ours] = theirs
    return Form(columns=columns, answer_after=args.answer_after, is_set=True)


def unverified(prepared: Prepared) -> str:
    """How many answers are not correct by their own verifier, and which; one line."""
    from sgpo_async.config import Tasks
    from sgpo_async.tasks.self_check import SelfCheck

    problems = [problem for problems in prepared.sets.values() for problem in problems]
    return SelfCheck.run(problems, sample=len(problems), tasks=Tasks()).describe()


def facts_of(sources: Sequence[Source], benchmarks: Sequence[Source], rules: Rules) -> dict[str, Any]:
    """Everything that the results depend on."""
    from sgpo_async import __version__

    return {
        "version": __version__,
        "rules": asdict(rules),
        "sources": [source.facts for source in sources],
        "benchmarks": [source.facts for source in benchmarks],
    }


def write(folder: Path, prepared: Prepared, *, suffix: str, facts: dict[str, Any]) -> None:
    """Write all files, the manifest last. Raises SgpoError."""
    from sgpo_async.files import write_whole
    from sgpo_async.tasks.writing import sha256, write_lines, write_problems

    sets: dict[str, Any] = {}
    for name, problems in prepared.sets.items():
        path = folder / f"{name}.{suffix}"
        write_problems(path, problems)
        sets[name] = {"file": path.name, "sha256": sha256(path), **counts_of(problems)}
    write_lines(folder / REMOVED, map(removed_record, prepared.removed))
    removed = Counter(one.reason for one in prepared.removed)
    text = json.dumps({**facts, "removed": dict(sorted(removed.items())), "sets": sets}, indent=2, ensure_ascii=False)
    write_whole(folder / MANIFEST, text + "\n")


def counts_of(problems: Sequence[Problem]) -> dict[str, int]:
    """The number of problems, and how many have each optional column."""
    return {
        "problems": len(problems),
        "with_response": sum(one.response is not None for one in problems),
        "with_strategy": sum(one.strategy is not None for one in problems),
    }


def removed_record(removed: Removed) -> dict[str, Any]:
    """One line of removed.jsonl."""
    return {
        "reason": removed.reason,
        "source": removed.problem.id,
        "problem": removed.problem.problem,
        "answer": removed.problem.answer,
        "benchmark": removed.evaluation or None,
        "like": removed.like.id,
        "like_problem": removed.like.problem,
        "like_answer": removed.like.answer,
        "overlap": round(removed.overlap, 4),
        "shared": removed.shared or None,
    }


def report(prepared: Prepared, sources: Sequence[Source], *, checked: bool) -> Iterator[str]:
    """The report for the user, line by line."""
    yield f"read {sum(len(one.problems) for one in sources):,} problems, removed {len(prepared.removed):,}"
    for reason, count in sorted(Counter(one.reason for one in prepared.removed).items()):
        yield f"  {count:,} {reason}"
    for name, problems in prepared.sets.items():
        counts = counts_of(problems)
        with_response, with_strategy = counts["with_response"], counts["with_strategy"]
        yield f"{name}: {len(problems):,} problems, {with_response:,} with response, {with_strategy:,} with strategy"
    if ignored := sorted({column for one in sources for column in one.facts["ignored_columns"]}):
        yield f"note: columns that are not kept: {', '.join(ignored)}"
    if any(one.reason == "duplicate with another answer" for one in prepared.removed):
        yield f"note: some duplicates have other answers, one of which is wrong or written differently: {REMOVED}"
    if not checked:
        yield "note: no --benchmark is named, so nothing was compared with evaluation sets"
