"""`sgpo-async strategies`: a library of strategies from a stronger model's responses.

sgpo-async strategies extract FILE ... --work WORK.jsonl --library LIBRARY --url URL --model MODEL
sgpo-async strategies rank WORK.jsonl --library LIBRARY --url URL --model MODEL
sgpo-async strategies check LIBRARY ...
sgpo-async strategies stats WORK.jsonl

Instead of --url, --serve launches SGLang here, as an actor launches its own, with the model that --model names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgpo_async.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sgpo_async.config import Run
    from sgpo_async.engines.sglang.serving.texts import TextServer
    from sgpo_async.strategies import Journal, Pipeline, Server
    from sgpo_async.strategies.journal import Record
    from sgpo_async.tasks.base import Problem

    OwnServer = AbstractAsyncContextManager[TextServer]

LEAKS = 1  # exit code of `check`
FORMATS = (".jsonl", ".parquet")
OWN = "own SGLang"  # in the provenance of replies; the port differs each time
FIXED = ("model", "messages", "stream", "n")  # fields of a request that --extra cannot change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """{extract,rank,check,stats} FILE ... [...]."""
    parser.add_argument(
        "action",
        choices=["extract", "rank", "check", "stats"],
        help="make a library; judge a work file's candidates anew; find leaks in libraries; figures of a work file",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="problems with responses; a work file; libraries")
    parser.add_argument("--work", type=Path, metavar="WORK.jsonl", help="extract: every finished item; goes on from it")
    parser.add_argument("--library", type=Path, metavar="LIBRARY", help="extract, rank: result, .jsonl or .parquet")
    parser.add_argument("--url", metavar="URL", help="URL of an OpenAI-compatible server, ending in /v1")
    parser.add_argument(
        "--serve",
        metavar="key=value",
        nargs="*",
        help="launch SGLang here instead of asking --url, as an actor launches its own: engine settings, e.g. "
        "engine.sglang.tp=8, or a configuration; --model is then a model's folder or hub name",
    )
    parser.add_argument("--model", metavar="MODEL", help="name of the model on the server")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the API key")
    parser.add_argument("--candidates", type=int, default=5, metavar="N", help="for each response (default: 5)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="items at a time (default: 8)")
    parser.add_argument("--structured", action="store_true", help="constrain replies to the form by a JSON schema")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="maximum length of a reply (default: 1024)"
    )
    parser.add_argument(
        "--extra",
        default="{}",
        metavar="JSON",
        help="further fields of each request, as an object; null removes a field",
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="timeout of one request (default: 120)"
    )
    parser.add_argument("--prompt-price", type=float, default=0.0, metavar="P", help="price of a million prompt tokens")
    parser.add_argument(
        "--completion-price", type=float, default=0.0, metavar="P", help="price of a million completion tokens"
    )


def run(args: argparse.Namespace) -> int:
    """Do it. Raises SgpoError."""
    return {"extract": _extract, "rank": _rank, "check": _check, "stats": _stats}[args.action](args)


def _extract(args: argparse.Namespace) -> int:
    from sgpo_async.strategies import Journal
    from sgpo_async.strategies.journal import key_of

    _need(args, "work", "library", "model")
    own = _examine(args)
    problems = _with_responses(args.files)
    journal = Journal(args.work)

    async def work(pipeline: Pipeline) -> None:
        await pipeline.extract(problems)

    if all(journal.done(key_of(problem)) for problem in problems):
        own = None  # no endpoint is needed
    return _with_endpoint(args, journal, work, own, total=len(problems))


def _rank(args: argparse.Namespace) -> int:
    from sgpo_async.strategies import Journal

    _need(args, "library", "model")
    own = _examine(args)
    journal = Journal(_work_file(args))

    async def work(pipeline: Pipeline) -> None:
        await pipeline.rank()

    return _with_endpoint(args, journal, work, own, total=sum(bool(r["candidates"]) for r in journal.records.values()))


def _check(args: argparse.Namespace) -> int:
    from sgpo_async.strategies import check
    from sgpo_async.tasks.files import read_problems

    problems = [problem for file in args.files for problem in read_problems(file)]
    found = list(check(problems))
    for place, leak in found:
        print(f"{place}: {leak}")
    checked = [problem for problem in problems if problem.strategy is not None]
    print(f"{len(problems):,} problems, {len(checked):,} with a strategy, {len(found):,} of which leak")
    if without := sum(problem.response is None for problem in checked):
        print(f"{without:,} have no response: only the answer was looked for in their strategies")
    return LEAKS if found else 0


def _stats(args: argparse.Namespace) -> int:
    from sgpo_async.strategies import Journal

    journal = Journal(_work_file(args))
    journal.close()
    _show(journal, args)
    return 0


def _with_endpoint(args: argparse.Namespace, journal: Journal, work: Any, own: OwnServer | None, *, total: int) -> int:
    """Run `work` with a progress bar, write the library, say what came of it. `own`: launched and asked for --url."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sgpo_async.strategies import Endpoint, Pipeline

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    async def ask(server: Server) -> None:
        with Progress(*columns) as progress:
            bar = progress.add_task("strategies", total=total)
            failed = 0

            def told(record: Record) -> None:
                nonlocal failed
                failed += bool(record["failed"])
                progress.update(bar, advance=1, description=f"strategies ({failed} failed)" if failed else "strategies")

            async with Endpoint(server) as endpoint:
                await work(
                    Pipeline(
                        endpoint, journal, candidates=args.candidates, concurrency=args.concurrency, on_record=told
                    )
                )

    async def run_all() -> None:
        if own is None:
            await ask(_server(args))
            return
        print(f"SGLang starts with {args.model}; its log: {_server_log(args)}", file=sys.stderr, flush=True)
        async with own as server:
            await server.during(ask(replace(_server(args), url=server.url, name=OWN)))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: the library comes first
    whole = False
    try:
        asyncio.run(run_all())
        whole = True
    finally:
        journal.close()
        _conclude(args, journal, whole=whole)
    return 0


def _conclude(args: argparse.Namespace, journal: Journal, *, whole: bool) -> None:
    """Tell how it stands, and write the library of what is finished, whatever ended the run; of nothing, none."""
    from sgpo_async.strategies import write_library

    finished = any(not record["failed"] for record in journal.records.values())
    if whole or finished:
        _show(journal, args)
    if finished:
        written = write_library(args.library, journal.records.values())
        print(f"library: {args.library}, {written:,} problems")


def _own_server(args: argparse.Namespace) -> OwnServer:
    """The one that --serve describes; it is launched on entering. Raises ConfigError, DataError."""
    from sgpo_async.engines.sglang.serving.texts import text_server
    from sgpo_async.model.folder import model_folder

    try:
        folder = model_folder(args.model)
    except DataError as error:
        raise DataError(str(error).replace("model.path", "--model", 1)) from None
    run = _served_run(args.serve)
    return text_server(folder, run.engine, dtype=run.model.dtype, served_name=args.model, log=_server_log(args))


def _server_log(args: argparse.Namespace) -> Path:
    return Path(args.work or args.files[0]).with_suffix(".sglang.log")


def _served_run(words: Sequence[str]) -> Run:
    """The settings that --serve names. Raises ConfigError."""
    from sgpo_async.config import load
    from sgpo_async.config.schema import require

    run = load("", words)
    own = run.engine.sglang
    require(
        not own.urls,
        "--serve: engine.sglang.urls",
        "must be empty, because --serve launches a server",
        own.urls,
        f"to ask a running server, use --url {own.urls[0]}/v1 instead" if own.urls else "",
    )
    require(
        own.servers == 1,
        "--serve: engine.sglang.servers",
        "must be 1",
        own.servers,
        "set engine.sglang.tp to use more GPUs",
    )
    return run


def _server(args: argparse.Namespace) -> Server:
    from sgpo_async.strategies import Server

    key = os.environ.get(args.key_env, "")
    return Server(
        url=args.url or "",
        model=args.model,
        key=key,
        timeout_s=args.timeout,
        max_tokens=args.max_tokens,
        structured=args.structured,
        extra=_extra(args.extra),
    )


def _extra(text: str) -> dict[str, Any]:
    from sgpo_async.config.schema import require

    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--extra must be JSON ({error}), got {text!r:.80}") from None
    require(isinstance(found, dict), "--extra", 'must be a JSON object such as {"top_p": 0.9}', found)
    for name in FIXED:
        require(name not in found, "--extra", f"must not contain {name}", found.get(name))
    return dict(found)


def _examine(args: argparse.Namespace) -> OwnServer | None:
    """Check the options before anything is paid for; returns the server of --serve. Raises ConfigError."""
    from sgpo_async.config.schema import require

    for name in ("candidates", "concurrency", "max_tokens"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')}", "must be >= 1", getattr(args, name))
    require(args.timeout > 0, "--timeout", "must be > 0", args.timeout)
    _extra(args.extra)
    if args.url is None and args.serve is None:
        raise ConfigError("--url or --serve must be given; name a server with --url, or launch one with --serve")
    require(args.url is None or args.serve is None, "--serve", "must not be given with --url", args.url)
    rule = f"must be a file name that ends in {' or '.join(FORMATS)}"
    require(args.library.suffix in FORMATS, "--library", rule, str(args.library))
    read = [Path(name).resolve() for name in (*args.files, args.work) if name]
    rule = "must not be a file that the command reads, because it would be overwritten"
    require(args.library.resolve() not in read, "--library", rule, str(args.library))
    return None if args.serve is None else _own_server(args)


def _with_responses(files: Sequence[str]) -> list[Problem]:
    from sgpo_async.strategies.journal import key_of
    from sgpo_async.tasks.files import read_problems

    problems = {key_of(problem): problem for file in files for problem in read_problems(file) if problem.response}
    if not problems:
        raise DataError(f"{', '.join(files)}: at least one problem must have a response; add the column 'response'")
    return list(problems.values())


def _work_file(args: argparse.Namespace) -> Path:
    path = Path(args.files[0])
    if len(args.files) > 1 or not path.is_file():
        raise DataError(f"FILE must be one work file that `extract` wrote, got {' '.join(args.files)!r}")
    return path


def _need(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise ConfigError(f"--{name} must be given to strategies {args.action}; see sgpo-async strategies --help")


def _show(journal: Journal, args: argparse.Namespace) -> None:
    """What was made, rejected and paid, and how good it is."""
    from sgpo_async.strategies.library import journal_metrics

    found = journal_metrics(journal, prompt_price=args.prompt_price, completion_price=args.completion_price)
    print(f"{found['items']:,} problems: {found['finished']:,} with a strategy")
    for reason, count in sorted(found["failed"].items()):
        print(f"  {count:,} failed: {reason}; a second run tries again")
    if found["interrupted"]:
        print(f"  {found['interrupted']:,} interrupted; a second run goes on")
    if found["old_scores"]:
        print(f"  {found['old_scores']:,} keep their old scores: the new judge's could not be had; rank tries again")
    print(f"{found['candidates']:,} candidates kept", end="")
    print("".join(f", {count:,} rejected ({reason})" for reason, count in sorted(found["rejected"].items())))
    print(f"{found['prompt_tokens']:,} tokens sent, {found['completion_tokens']:,} received", end="")
    print(f", cost {found['cost']:,.2f}" if args.prompt_price or args.completion_price else "")
    print("mean score of the best candidate (1 to 5):")
    most = max(found["scores"].values()) or 1
    for score, count in found["scores"].items():
        print(f"  {score}  {'█' * round(40 * count / most):<40} {count:,}")
