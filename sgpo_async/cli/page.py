"""docs/commands.md, from the parsers: python -m sgpo_async.cli.page > docs/commands.md

`--help` prints the same, but wrapped in a way that differs between releases of Python.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator, Sequence

from sgpo_async import logs
from sgpo_async.cli.main import COMMANDS, parser_of

HEAD = """\
# Commands

<!-- Written by: python -m sgpo_async.cli.page > docs/commands.md -->

Every command with its arguments, as `sgpo-async COMMAND --help` prints them. In a checkout,
`python launch/COMMAND.py` is the same for actor, bench, doctor, evaluate, experiment, hub, learner, local and sft, and
`python -m sgpo_async.cli COMMAND` for all. Each command also has `--log-format human|json` and
`--log-level debug|info|warning|error`; logs go to standard error, results to standard output. `sgpo-async --version`
prints the version.

Exit codes: 0 done; 1 the program itself is wrong, with a traceback; 2 an error that the user can correct, in one line
([errors.md](errors.md)); 3 an actor's error that may pass; 130 Ctrl-C; 143 SIGTERM; 141 nobody reads the output.

| command | |
|---|---|
"""
EVERYWHERE = ("--help", "--log-format", "--log-level")  # options of every command


def page() -> str:
    """The text of docs/commands.md."""
    for name in (logs.FORMAT, logs.LEVEL):  # which a parent process sets for its children
        os.environ.pop(name, None)
    rows = "".join(f"| [{name}](#sgpo-async-{name}) | {_text(text)} |\n" for name, text in COMMANDS.items())
    return HEAD + rows + "".join(f"\n{block}\n" for name in COMMANDS for block in _blocks(parser_of(name), 2))


def _blocks(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """The parts of a command's section, then those of the commands within it."""
    actions = [one for one in parser._actions if not set(EVERYWHERE) & set(one.option_strings)]
    inner = [one for one in actions if isinstance(one, argparse._SubParsersAction)]
    plain = [one for one in actions if one not in inner and one.help != argparse.SUPPRESS]
    yield f"{'#' * level} {parser.prog}"
    if parser.description:
        yield _text(parser.description)
    yield f"```\n{_usage(parser.prog, plain, inner)}\n```"
    if plain:
        yield "\n".join(_argument(one, parser.prog) for one in plain)
    if epilog := textwrap.dedent(parser.epilog or "").strip():
        yield f"```\n{epilog}\n```"
    for action in inner:
        helps = {one.dest: one.help for one in action._choices_actions}
        for name, child in action.choices.items():
            child.description = child.description or helps.get(name)
            yield from _blocks(child, level + 1)


def _usage(prog: str, plain: list[argparse.Action], inner: Sequence[argparse.Action]) -> str:
    words = [prog, *(_placed(one) for one in plain if not one.option_strings)]
    words += [f"{one.option_strings[-1]} {_value(one)}" for one in plain if one.option_strings and one.required]
    optional = any(one.option_strings and not one.required for one in plain)
    return " ".join([*words, *(["COMMAND ..."] if inner else []), *(["[options]"] if optional else [])])


def _placed(action: argparse.Action) -> str:
    """A positional argument in the line of the usage."""
    word = _value(action)
    forms = {"?": f"[{word}]", "*": f"[{word} ...]", "+": f"{word} [{word} ...]"}
    return forms.get(str(action.nargs), word)


def _value(action: argparse.Action) -> str:
    """What stands for the value of an argument; "" for a switch."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices:
        return "|".join(map(str, action.choices))
    return action.dest.upper() if action.option_strings else action.dest


def _argument(action: argparse.Action, prog: str) -> str:
    """An item of the list: how the argument is written, and its help."""
    name = ", ".join(action.option_strings)
    many = " ..." if action.option_strings and action.nargs in ("+", "*") else ""
    text = (action.help or "") % {**vars(action), "prog": prog}
    return f"- `{f'{name} {_value(action)}{many}'.strip()}`" + (f": {_text(text)}" if text else "")


def _text(text: str) -> str:
    """A help text, of which Markdown must not take anything for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


if __name__ == "__main__":
    print(page(), end="")
