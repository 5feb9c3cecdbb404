"""`sgpo-async init`: asks three questions and writes a first configuration, with a comment for each key.

sgpo-async init                                                        asks; Enter takes the default
sgpo-async init run.yaml --yes                                         the defaults: the demo's problems on a CPU
sgpo-async init run.yaml --model DIR --problems FILE --machine 8       eight GPUs, without a question
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sgpo_async.cli.starter import BUILTIN_MODEL, Answers, Machine, ProblemFacts, starter
from sgpo_async.errors import ConfigError, DataError, SgpoError

if TYPE_CHECKING:
    from sgpo_async.tasks.records import Form

OWN = "builtin"  # as an answer: the model or the problems that come with the package
CPU, CPU_SGLANG = "cpu", "cpu-sglang"
MACHINES = f"{CPU}, {CPU_SGLANG} (with an SGLang server), or the number of GPUs"
GSM8K = "####"  # in an answer: the final answer follows, and a solution stands before it

Answer = TypeVar("Answer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[FILE] [--model M] [--problems P] [--machine M] [--yes] [--force] and how the problems are read."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, default=Path("run.yaml"), help="default: run.yaml"
    )
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder or hub name, or builtin (default)")
    parser.add_argument("--problems", metavar="FILE", help="JSONL, CSV, Parquet or a dataset, or builtin (default)")
    parser.add_argument("--machine", metavar="WHICH", help=f"{MACHINES} (default: {CPU})")
    parser.add_argument("--yes", action="store_true", help="ask nothing: take the defaults for what no option says")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="name of a column of the problems, e.g. problem=question; may be repeated",
    )
    parser.add_argument(
        "--answer-after", default="", metavar="TEXT", help="the answer follows this text in its column, e.g. '####'"
    )


def run(args: argparse.Namespace) -> int:
    """Ask, check, write, and print what to do next. Raises SgpoError."""
    from sgpo_async.cli.data import form_of
    from sgpo_async.config import load
    from sgpo_async.files import write_whole

    if args.file.exists() and not args.force:
        raise ConfigError(f"{args.file}: exists; name another FILE, or overwrite it with --force")
    if args.file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"FILE must end in .yaml, got {str(args.file)!r}")
    form = form_of(args)
    ask = _Questions(quiet=args.yes)
    model = ask("Which model? A Hugging Face folder or hub name", "--model", args.model, OWN, _model)
    problems = ask(
        "Which problems? A file, or a Hugging Face dataset", "--problems", args.problems, OWN, lambda p: _read(p, form)
    )
    if problems is not None and model == BUILTIN_MODEL:
        raise ConfigError("--model must name a model of yours: the built-in one knows no other problems' words")
    machine = ask(f"Which machine? {MACHINES}", "--machine", args.machine, CPU, _machine)
    answers = Answers(args.file.stem, model, problems, machine, *_facts(model))
    write_whole(args.file, starter(answers))
    load(args.file)
    print(f"written: {args.file}\n\nnext:")
    for command, purpose in next_commands(args.file, machine).items():
        print(f"  {command}    # {purpose}" if purpose else f"  {command}")
    return 0


def next_commands(file: Path, machine: Machine) -> dict[str, str]:
    """What to enter now, and why."""
    from sgpo_async.config import Hub
    from sgpo_async.installation import sglang_for_cpus, under_torchrun

    name = shlex.quote(str(file))
    checks = {
        f"sgpo-async doctor {name}": "checks model, problems, memory and disk",
        f"sgpo-async plan {name}": "memory and time, before anything starts",
    }
    if machine.sglang and not machine.gpus:
        checks = {f"# SGLang's environment first, {sglang_for_cpus()}": ""} | checks
    if machine.gpus < 2:
        return checks | {f"sgpo-async local {name}": "the run, with a live display and a report"}
    devices = [str(number) for number in range(machine.gpus)]
    trained, serving = devices[: machine.learner_gpus], devices[machine.learner_gpus :]
    torchrun = ["torchrun", "--nproc-per-node", str(len(trained)), *under_torchrun("learner")]
    address = Hub().address
    return checks | {
        f"CUDA_VISIBLE_DEVICES={trained[0]} sgpo-async hub {name} &": "the three parts of the run",
        f"CUDA_VISIBLE_DEVICES={','.join(trained)} {shlex.join(torchrun)} {name} --hub {address} &": "",
        f"CUDA_VISIBLE_DEVICES={','.join(serving)} sgpo-async actor --hub {address}": "",
    }


class _Questions:
    """Asks what no option has answered. With `quiet` the default is the answer."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(
        self, question: str, option: str, given: str | None, default: str, check: Callable[[str], Answer]
    ) -> Answer:
        """The checked answer. A wrong one is asked for again; a wrong option raises SgpoError."""
        if given is not None or self._quiet:
            return check(default if given is None else given)
        while True:
            print(f"{question} [{default}]: ", end="", flush=True)
            line = sys.stdin.readline()
            if not line:
                raise ConfigError(f"init: no answer; give {option}, or --yes for the defaults")
            try:
                return check(line.strip() or default)
            except SgpoError as error:
                print(f"error: {error}", file=sys.stderr)


def _model(answer: str) -> str:
    """The value of model.path. Raises DataError."""
    from sgpo_async.model.folder import model_folder

    if answer in (OWN, BUILTIN_MODEL):
        return BUILTIN_MODEL
    model_folder(answer)
    if "/" not in answer and not Path(answer).expanduser().is_dir():
        raise DataError(f"--model: {answer}: no such folder; name a folder, a model on the hub (OWNER/NAME), or {OWN}")
    return answer


def _machine(answer: str) -> Machine:
    if answer in (CPU, CPU_SGLANG):
        return Machine(sglang=answer == CPU_SGLANG)
    if not answer.isdecimal() or not 1 <= int(answer) <= 64:
        raise ConfigError(f"--machine must be {MACHINES}, got {answer!r}")
    return Machine(gpus=int(answer), sglang=int(answer) > 1)


def _read(answer: str, form: Form) -> ProblemFacts | None:
    """What the file holds, every record of it checked; None for the built-in problems. Raises DataError."""
    from sgpo_async.tasks.files import read_split
    from sgpo_async.tasks.rows import open_rows

    if answer == OWN:
        return None
    rows = open_rows(answer)
    form = _usual_form(rows[0][1], form) if len(rows) and isinstance(rows[0][1], dict) else form
    try:
        split = read_split(rows, answer, held_out=1, form=form)
    except DataError as error:
        hint = "; here as --column OURS=THEIRS" if "tasks.columns" in str(error) else ""
        raise DataError(f"{error}{hint}") from None
    return ProblemFacts(answer, len(split.training) + 1, split.strategies, dict(form.columns), form.answer_after)


def _usual_form(record: Mapping[str, Any], form: Form) -> Form:
    """The form, with usual names of public datasets in place of columns that the first record lacks.

    An answer with `####` is a solution, as in GSM8K: the final answer is what follows.
    """
    from sgpo_async.tasks.records import USUAL

    columns = dict(form.columns)
    for ours, names in USUAL.items():
        theirs = [column for column in record if column.casefold() in names]
        if ours not in columns and ours not in record and len(theirs) == 1:
            columns[ours] = theirs[0]
    answer = columns.get("answer", "answer")
    after = form.answer_after or (GSM8K if GSM8K in str(record.get(answer)) else "")
    if after == GSM8K and "response" not in record:
        columns.setdefault("response", answer)
    return replace(form, columns=columns, answer_after=after)


def _facts(model: str) -> tuple[bool, int | None]:
    """Whether the tokenizer has a chat template (of a hub name: yes), and the length of the longest sequence."""
    from sgpo_async.model.folder import longest_sequence, model_folder

    folder = Path(model_folder(model))
    if not folder.is_dir():
        return True, None
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    chat = (folder / "chat_template.jinja").exists() or bool(settings.get("chat_template"))
    return chat, longest_sequence(str(folder))
