"""`sgpo-async evaluate`: avg@k and pass@k of a model on benchmarks, or two such evaluations compared.

    sgpo-async evaluate CONFIG --model runs/demo/policy --benchmark math500=FILE --samples 4 --out FOLDER
    sgpo-async evaluate --compare FOLDER FOLDER

After an interruption the same command continues with the problems that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_async.cli.options import CONFIG, load_run, print_dry_run
from sgpo_async.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sgpo_async.config import Run
    from sgpo_async.evaluation.evaluation_plan import EvaluationPlan
    from sgpo_async.evaluation.run import Progress
    from sgpo_async.tasks.benchmarks import Benchmark

PAPER_TEMPERATURE, PAPER_TOP_P = 0.6, 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] and what to evaluate, or --compare A B."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=CONFIG)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides a key, e.g. engine.slots=256")
    parser.add_argument("--model", default="", metavar="FOLDER", help="e.g. runs/demo/policy (default: model.path)")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="JSONL, CSV or Parquet, may be repeated; a NAME alone is one of evaluation.benchmarks, or held-out: the "
        "configuration's own held-out problems (default)",
    )
    parser.add_argument(
        "--samples",
        action="append",
        default=[],
        metavar="K|NAME=K",
        help="completions of each problem, of all benchmarks or of one; may be repeated (default: 1)",
    )
    parser.add_argument(
        "--temperature", type=float, default=PAPER_TEMPERATURE, metavar="T", help="default: 0.6, the paper's"
    )
    parser.add_argument("--top-p", type=float, default=PAPER_TOP_P, metavar="P", help="default: 0.95, the paper's")
    parser.add_argument("--guided", action="store_true", help="with the strategies before the problems")
    parser.add_argument("--texts", action="store_true", help="keep the completions")
    parser.add_argument(
        "--out", default="", metavar="FOLDER", help="folder of the results (default: out/name/evaluation)"
    )
    parser.add_argument("--compare", nargs=2, metavar="FOLDER", help="two evaluations, A and B: is A better?")
    parser.add_argument("--dry-run", action="store_true", help="print the whole configuration and what would start")


def run(args: argparse.Namespace) -> int:
    """Evaluate or compare, and print a table. Raises SgpoError."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    if args.compare:
        if args.config:
            raise ConfigError("--compare takes two folders and no configuration; remove the configuration")
        return _compare(console, *map(Path, args.compare))
    if not args.config:
        raise ConfigError("evaluate: name a configuration, e.g. builtin:demo, or two folders with --compare")
    settings = load_run(args)
    if args.model:
        settings = replace(settings, model=replace(settings.model, path=args.model))
    asked = {"samples": parse_samples(args.samples), "guided": args.guided}
    plan = plan_of(settings, args.benchmark, **asked, temperature=args.temperature, top_p=args.top_p)
    out = Path(args.out or f"{settings.folder}/evaluation")
    if args.dry_run:
        print_dry_run(settings, [_command(args)])
        guided = "with strategies, " if plan.guided else ""
        print(f"# {guided}at temperature {plan.temperature:g}, top-p {plan.top_p:g}, into {out}:")
        for benchmark in plan.benchmarks:
            print(f"#   {benchmark.name}: {len(benchmark.problems)} problems x {benchmark.samples}")
        return 0
    found = evaluate_shown(plan, out, texts=args.texts)
    from sgpo_async.cli.evaluation_tables import summary

    _print(console, [*summary(found), f"results: {out}"])
    return 0


def _command(args: argparse.Namespace) -> list[str]:
    """The call that `args` came from, without --dry-run."""
    arguments = [
        "sgpo-async",
        "evaluate",
        args.config,
        *args.overrides,
        *(["--model", args.model] if args.model else []),
    ]
    for name in ("benchmark", "samples"):
        arguments += [word for value in getattr(args, name) for word in (f"--{name}", value)]
    arguments += ["--temperature", f"{args.temperature:g}"] * (args.temperature != PAPER_TEMPERATURE)
    arguments += ["--top-p", f"{args.top_p:g}"] * (args.top_p != PAPER_TOP_P)
    arguments += [f"--{name}" for name in ("guided", "texts") if getattr(args, name)]
    return [*arguments, "--out", args.out] if args.out else arguments


def plan_of(
    settings: Run,
    benchmarks: Sequence[str],
    *,
    samples: Mapping[str, int],
    temperature: float,
    top_p: float,
    guided: bool,
) -> EvaluationPlan:
    """Read the benchmarks. Raises ConfigError or DataError.

    Args:
        benchmarks: NAME=FILE, or a name as --benchmark takes it; none: the held-out problems.
        samples: completions of each problem by benchmark, with "" for all others.
    """
    from sgpo_async.evaluation.evaluation_plan import EvaluationPlan

    opened = [_open(settings, word, samples) for word in benchmarks or ["held-out"]]
    names = [benchmark.name for benchmark in opened]
    if len(set(names)) < len(names):
        raise ConfigError(f"--benchmark: {', '.join(names)}: a name occurs twice")
    if unknown := samples.keys() - {"", *names}:
        raise ConfigError(f"--samples: {min(unknown)} must name one of the benchmarks, which are {', '.join(names)}")
    return EvaluationPlan(run=settings, benchmarks=opened, temperature=temperature, top_p=top_p, guided=guided)


def parse_samples(arguments: Sequence[str]) -> dict[str, int]:
    """{benchmark: k}, with "" for all others. Raises ConfigError."""
    found = {"": 1}
    for word in arguments:
        name, _, number = word.rpartition("=")
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--samples: must be K or NAME=K, e.g. 4 or aime24=32, got {word!r}")
        found[name] = int(number)
    return found


def _open(settings: Run, word: str, samples: Mapping[str, int]) -> Benchmark:
    from sgpo_async.config import Evaluation
    from sgpo_async.config.rules import expanded, require
    from sgpo_async.config.schema import HELD_OUT, BenchmarkFile
    from sgpo_async.tasks.benchmarks import Benchmark, open_benchmark
    from sgpo_async.tasks.sources import open_source

    name, equals, path = word.partition("=")
    configured = settings.evaluation.benchmarks
    k = samples.get(name) or (not equals and name in configured and configured[name].samples) or samples[""]
    if name == HELD_OUT and not equals:
        own = settings.tasks
        require(
            not own.environment,
            "tasks.environment",
            "must be empty for the held-out problems, because sgpo-async evaluate samples single completions",
            own.environment,
        )
        source = open_source(own.source, path=own.path, held_out=own.held_out, seed=settings.seed, tasks=own)
        return Benchmark(
            name=name, problems=source.held_out(), samples=k, verifier=source.verifier, solved_at=own.solved_at
        )
    if not equals and name not in configured:
        known = ", ".join([HELD_OUT, *configured])
        raise ConfigError(f"--benchmark: {word} names no file (NAME=FILE) and none of {known}")
    Evaluation(benchmarks={name: BenchmarkFile(path=path)})  # validates the name
    path = expanded("--benchmark", path)
    return open_benchmark(name, path if equals else configured[name].path, samples=k)


def evaluate_shown(plan: EvaluationPlan, out: Path, *, texts: bool) -> dict[str, Any]:
    """Evaluate, with progress on standard error; returns the summary. Raises SgpoError."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False)

    def log(line: str) -> None:
        console.print(line, highlight=False)

    with console.status("loading the model ...") if console.is_terminal else _nothing():
        from sgpo_async.evaluation.run import evaluate  # imports torch, which takes seconds
    with _progress(console) as progress:
        return evaluate(plan, out, texts=texts, progress=progress, tell=log)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Show progress: a bar at a terminal, otherwise a line at the beginning and at every tenth."""
    if not console.is_terminal:
        yield _tenths
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("problems"))
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tenths(done: int, total: int) -> None:
    if done * 10 // total > (done - 1) * 10 // total:
        print(f"{done} of {total} problems", file=sys.stderr, flush=True)


def _compare(console: Console, a: Path, b: Path) -> int:
    from sgpo_async.cli.evaluation_tables import comparison
    from sgpo_async.evaluation.compare import compare_folders

    _print(console, comparison(a, b, compare_folders(a, b)))
    return 0


def _print(console: Console, lines: Iterable[RenderableType]) -> None:
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str), highlight=False)
