"""Entry of every command: find it, parse its arguments, run it, and turn errors into one line and an exit code.

Exit codes: 0 done, 1 the program itself is wrong (traceback), 2 an error that the user can correct, 130 Ctrl-C,
141 nobody reads the output any more (as behind `| head`), 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import io
import math
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sgpo_async import __version__, logs
from sgpo_async.errors import ConfigError, Interrupted, SgpoError
from sgpo_async.processes.stacks import print_stacks_on_signal

SIGNAL = 128  # an exit code above it says which signal has ended the command
UNREAD = SIGNAL + signal.SIGPIPE
COMMANDS = {  # each a module of this package with `add_arguments(parser)` and `run(args) -> int`
    "init": "asks three questions and writes a first configuration",
    "configs": "lists the configurations that come with sgpo-async, which every command takes as builtin:NAME",
    "local": "a whole run on this machine: hub, learner under torchrun, actors",
    "learner": "one rank of the learner; start it under torchrun",
    "sft": "one rank of a supervised warm-up; start it under torchrun",
    "actor": "an inference node that joins a hub, at any time",
    "hub": "the hub as a process of its own, for learners that connect to it with --hub",
    "doctor": "checks whether a configuration can run here: servers, model, problems, ports, memory, disk",
    "plan": "memory, tokens per second and GPU-hours of a configuration, and what does not fit",
    "advise": "which side limits a run, what one change brings, and the best division of GPUs",
    "bench": "throughput: generation alone, learning alone, synchronous, asynchronous",
    "fuzz": "changed messages, checkpoints and configurations: is each refused as it should be",
    "chaos": "a run under seeded faults of every kind, whose journal is audited afterwards",
    "strategies": "strategies from a stronger model's responses: extract, rank, check, stats",
    "evaluate": "avg@k and pass@k of a model on benchmarks; compares two evaluations",
    "experiment": "methods x settings x seeds with an equal sample budget: tables and figures",
    "data": "splits problems into sets for warm-up, its validation and RL: deduplicated, decontaminated, seeded",
    "watch": "the live display of a run, from any machine that reaches its hub",
    "dashboard": "a run in a browser, for Prometheus and Grafana: fleet, ledger, curves, advice, completions",
    "samples": "completions of a run: problem, strategy, rollouts, and where distillation changes them",
    "chat": "tries a policy on problems, with and without a strategy",
    "report": "writes runs/NAME/report.html from a run's metrics",
    "track": "writes a run, or what is missing of it, to TensorBoard, W&B or MLflow",
    "completion": "prints a script that completes commands, options and configurations in bash, zsh or fish",
    "keys": "makes a folder of keys for a hub that listens beyond loopback",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sgpo-async ARGV` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the output is not UTF-8
    try:
        try:
            return _dispatch(arguments)
        except Interrupted as error:
            if text := str(error):
                print(text if error.code > SIGNAL else f"error: {text}", file=sys.stderr)
            return error.code
        except SgpoError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        finally:
            sys.stdout.flush()  # now, and not when Python ends, where an error cannot be caught
    except BrokenPipeError:
        if not _drop_unread():
            raise
        return UNREAD


def _drop_unread() -> bool:
    """Whether nobody reads standard output or standard error any more; what is still written there is then dropped."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # 0: only errors, such as a pipe without a reader
    unread = [number for number, _ in poll.poll(0)]
    for number in unread:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), number)
    return bool(unread)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sgpo-async {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise SgpoError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}")
    args = parser_of(name).parse_intermixed_args(arguments[1:])
    _check_finite(args)
    os.environ[logs.FORMAT], os.environ[logs.LEVEL] = args.log_format, args.log_level
    logs.set_up(name, name=getattr(args, "name", None) or "")
    print_stacks_on_signal()
    code: int = importlib.import_module(f"sgpo_async.cli.{name}").run(args)
    return code


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command's arguments."""
    command = importlib.import_module(f"sgpo_async.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"sgpo-async {name}",
        description=COMMANDS[name][0].upper() + COMMANDS[name][1:] + ".",
        epilog=(command.__doc__ or "").partition("\n\n")[2],  # the examples in the module's docstring
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    _add_log_options(parser)
    return parser


def _check_finite(args: argparse.Namespace) -> None:
    """Raise ConfigError for an option that is not a number or infinite."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be a finite number, got {value}")


def _add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add --log-format and --log-level; their defaults are inherited from the parent process."""
    group = parser.add_argument_group("logging, on standard error")
    form, level = os.environ.get(logs.FORMAT, "human"), os.environ.get(logs.LEVEL, "info")
    group.add_argument("--log-format", choices=("human", "json"), default=form, help="default: %(default)s")
    group.add_argument("--log-level", choices=logs.LEVELS, default=level, help="default: %(default)s")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    head = ["usage: sgpo-async COMMAND ...", "", "Asynchronous post-training by SGPO.", "", "commands:"]
    return "\n".join([*head, *lines, "", "sgpo-async COMMAND --help explains one command."])
