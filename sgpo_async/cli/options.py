"""Arguments that every command with a configuration has. `--help` does not import the configuration package."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgpo_async.config import Run

CONFIG = "YAML file, or one that sgpo-async has (sgpo-async configs), e.g. builtin:demo"


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--dry-run]."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG)
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="overrides a key, e.g. optim.lr=3e-4; a YAML file or builtin:NAME overrides several",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the whole configuration and what would start")


def load_run(args: argparse.Namespace) -> Run:
    """The validated configuration. Raises ConfigError."""
    from sgpo_async.config import load

    return load(args.config, args.overrides)


def config_arguments(args: argparse.Namespace, *more: str) -> list[str]:
    """The arguments that give a child process the same configuration, with the overrides `more` at the end."""
    from sgpo_async.config.builtin import is_builtin
    from sgpo_async.config.load import names_file

    def absolute(word: str) -> str:
        return word if is_builtin(word) else str(Path(word).resolve())

    overrides = [absolute(word) if names_file(word) else word for word in args.overrides]
    return [absolute(args.config), *overrides, *more]


def print_dry_run(run: Run, commands: Iterable[Sequence[str]]) -> None:
    """The resolved YAML, and the command lines as comments, so that the output is a valid configuration file."""
    from sgpo_async.config import to_yaml

    print(to_yaml(run), end="")
    print("# would start:")
    for command in commands:
        print(f"#   {shlex.join(command)}")


def say_notes(notes: Iterable[str]) -> None:
    """Print what the user should know before a run starts; control characters as escapes."""
    from sgpo_async.logs import printable

    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def record_config(run: Run, *, continues: bool) -> None:
    """Write config.yaml, the resolved configuration, into the run's folder. Raises SgpoError.

    Prints a warning if this overwrites an earlier run of the same name, which it does not if it `continues` that run.
    """
    from sgpo_async.config import to_yaml
    from sgpo_async.files import write_whole
    from sgpo_async.metrics.reader import METRICS

    folder = Path(run.folder)
    if (folder / METRICS).exists() and not continues:
        print(f"{run.folder}: overwrites an earlier run of this name; set name=OTHER to keep it", file=sys.stderr)
    write_whole(folder / "config.yaml", to_yaml(run))
