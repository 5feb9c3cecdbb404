"""`sgpo-async chat`: try a policy on problems of your own, without and with a strategy.

    sgpo-async chat runs/demo                                       reads problems and strategies from the terminal
    sgpo-async chat runs/demo --problem TEXT --strategy TEXT        one problem
    sgpo-async chat ./my-model --temperature 0.6 --max-new-tokens 2000

It takes a Hugging Face folder, or the folder of a run, also of one that still trains: then it uses the newest exported
policy or checkpoint. The engine runs in this process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo_async.errors import EngineError, SgpoError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from sgpo_async.evaluation.chat import Chat, Completion

SIDE_BY_SIDE = 100  # columns from which two completions stand side by side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN|FOLDER [--problem TEXT [--strategy TEXT]], and how to sample."""
    parser.add_argument("folder", metavar="RUN|FOLDER", type=Path, help="a run, e.g. runs/demo, or a model's folder")
    parser.add_argument("--problem", metavar="TEXT", help="try this problem only")
    parser.add_argument("--strategy", metavar="TEXT", help="for --problem")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: the run's rollout.temperature")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the run's rollout.max_new_tokens")
    parser.add_argument("--prompt", metavar="STYLE", help="as tasks.prompt; default: the run's")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Print completions until the input ends. Raises SgpoError."""
    if args.strategy is not None and args.problem is None:
        raise SgpoError("--strategy needs --problem; without both, they are read from the terminal")
    if args.temperature is not None and not args.temperature > 0:
        raise SgpoError(f"--temperature must be > 0, got {args.temperature:g}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise SgpoError(f"--max-new-tokens must be >= 1, got {args.max_new_tokens}")
    from rich.console import Console

    from sgpo_async.evaluation.chat import Chat, ChatSettings, find_policy

    found = find_policy(args.folder)
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(found.name, style="dim", soft_wrap=True)
    settings = ChatSettings(
        temperature=args.temperature, max_new_tokens=args.max_new_tokens, prompt=args.prompt, seed=args.seed
    )
    chat = Chat(found, settings)
    try:
        if args.problem is not None:
            _show(console, chat.complete(args.problem, args.strategy))
        else:
            _converse(console, chat)
    finally:
        chat.close()
    return 0


def _converse(console: Console, chat: Chat) -> None:
    for problem, strategy in _asked():
        try:
            _show(console, chat.complete(problem, strategy))
        except EngineError as error:  # this problem cannot be served; the next one may
            print(f"error: {error}", file=sys.stderr)


def _asked() -> Iterator[tuple[str, str | None]]:
    """Read problems with their strategies from standard input, until an empty line or its end."""
    while problem := _line("problem (an empty line ends): "):
        yield problem, _line("strategy (empty: none): ") or None


def _line(question: str) -> str:
    """Read one line; empty at the end of the input."""
    try:
        return input(question if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _show(console: Console, completions: list[Completion]) -> None:
    """Print the completions, two of them side by side if there is space."""
    from rich import box
    from rich.table import Table

    names = ("alone", "with the strategy")
    if len(completions) == 2 and console.width >= SIDE_BY_SIDE:
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 2, 0, 0))
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(_text, completions))
        console.print(table)
        return
    for name, completion in zip(names, completions, strict=False):
        console.print()
        console.print(name, style="bold")
        console.print(_text(completion))
    console.print()


def _text(completion: Completion) -> RenderableType:
    from rich.text import Text

    from sgpo_async.logs import printable

    ending = "" if completion.finish == "stop" else ", cut off: --max-new-tokens"
    return Text(printable(completion.text)).append(f"\n[{completion.tokens} tokens{ending}]", style="dim")
