"""The text of a first configuration: only keys that matter, each with a comment of one line.

Pure: what `init` has found out goes in, YAML comes out. The values are those of the configurations that come with the
package where one fits, and cautious ones otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BUILTIN_MODEL = "builtin:cues"
CPU_TOKENS, GPU_TOKENS = 256, 2048  # of a completion, if the model has room for them


@dataclass(frozen=True)
class ProblemFacts:
    """What a file of problems holds."""

    path: str
    count: int  # distinct problems
    strategies: int  # how many have a strategy
    columns: dict[str, str] = field(default_factory=dict)  # our names -> those of the file, where they differ
    answer_after: str = ""

    @property
    def held_out(self) -> int:
        """How many problems to set aside: a tenth, at most 200."""
        return max(1, min(200, self.count // 10))


@dataclass(frozen=True)
class Machine:
    """Where the run shall work: `gpus` 0 means on the CPU."""

    gpus: int = 0
    sglang: bool = False

    @property
    def learner_gpus(self) -> int:
        """How many GPUs train; the others generate. A single one does both."""
        return max(1, self.gpus // 2)

    @property
    def server_gpus(self) -> int:
        """How many GPUs have a server each."""
        return self.gpus - self.learner_gpus


@dataclass(frozen=True)
class Answers:
    """The answers to the three questions, checked."""

    name: str
    model: str
    problems: ProblemFacts | None  # None: the built-in ones
    machine: Machine
    chat: bool = False  # the model's tokenizer has a chat template
    positions: int | None = None  # length of the model's longest sequence; None: unknown


def starter(answers: Answers) -> str:
    """The configuration as YAML."""
    lines = [
        "# Written by sgpo-async init. Other keys have their defaults; sgpo-async local FILE --dry-run prints all.",
        f"name: {_text(answers.name)}  # the run writes into runs/{answers.name}",
        f"steps: {_steps(answers)}  # optimiser steps",
    ]
    for section in (_model, _tasks, _rollout, _algorithm, _optim, _learner, _evaluation, _engine, _local):
        lines += section(answers)
    return "\n".join(lines) + "\n"


def _steps(answers: Answers) -> int:
    return 120 if _is_demo(answers) else 50 if not answers.machine.gpus else 200


def _is_demo(answers: Answers) -> bool:
    """Whether the policy is the small one, whose values are those of builtin:demo."""
    return answers.model == BUILTIN_MODEL


def _model(answers: Answers) -> Iterator[str]:
    yield "model:"
    yield f"  path: {_text(answers.model)}  # the policy: the built-in one, a Hugging Face folder, or a name on its hub"
    if answers.machine.gpus:
        yield "  dtype: bfloat16  # of the weights that the engines get; the learner keeps float32"


def _tasks(answers: Answers) -> Iterator[str]:
    problems = answers.problems
    if problems is None:
        return
    yield "tasks:"
    yield "  source: file  # cues: the built-in problems"
    found = f"{problems.count:,} distinct problems, {problems.strategies:,} with a strategy"
    yield f"  path: {_text(problems.path)}  # {found}"
    if problems.columns:
        yield f"  columns: {json.dumps(problems.columns, ensure_ascii=False)}  # our names: those of the file"
    if problems.answer_after:
        yield f"  answer_after: {_text(problems.answer_after)}  # the answer is what follows this in its column"
    yield f"  held_out: {problems.held_out}  # problems set aside to measure progress"
    if answers.chat:
        yield "  prompt: chat  # the tokenizer's chat template; plain: strategy, newline, problem"
        yield '  suffix: "\\nPut the final answer into \\\\boxed{}."  # after every problem'


def _rollout(answers: Answers) -> Iterator[str]:
    yield "rollout:"
    small = not answers.machine.gpus and not _is_demo(answers)
    guided = _guided(answers)
    yield f"  autonomous: {4 if small else 8}  # completions of each problem without its strategy"
    yield f"  guided: {(2 if small else 4) if guided else 0}  # ... and with it"
    yield f"  max_new_tokens: {_max_new_tokens(answers)}  # of a completion; longer ones are cut"


def _max_new_tokens(answers: Answers) -> int:
    if _is_demo(answers):
        return 40
    wanted = GPU_TOKENS if answers.machine.gpus else CPU_TOKENS
    return min(wanted, answers.positions // 2) if answers.positions else wanted


def _guided(answers: Answers) -> bool:
    return answers.problems is None or answers.problems.strategies > 0


def _algorithm(answers: Answers) -> Iterator[str]:
    yield "algorithm:"
    if _guided(answers):
        yield "  objective: sgpo  # with a frozen teacher; for the paper's setting, give builtin:paper after this file"
    else:
        yield "  objective: grpo  # sgpo needs strategies, which 'sgpo-async strategies extract' makes"


def _optim(answers: Answers) -> Iterator[str]:
    yield "optim:"
    rate = "8.0e-4" if _is_demo(answers) else "1.0e-6" if answers.machine.gpus else "1.0e-5"
    yield f"  lr: {rate}  # the first value to tune"
    yield "  warmup_steps: 10  # steps in which the rate rises to lr"
    yield f"  schedule: {'linear' if _is_demo(answers) else 'constant'}  # of the rate after them; linear falls to 0"


def _learner(answers: Answers) -> Iterator[str]:
    yield "learner:"
    count = 16 if _is_demo(answers) else 32 if answers.machine.gpus else 8
    yield f"  problems_per_step: {max(count, answers.machine.learner_gpus)}  # the batch"
    if not _is_demo(answers):
        yield f"  row_tokens: {_max_new_tokens(answers) + 1024}  # a micro-batch: room for a completion and its prompt"
        yield "  recompute: 1  # activations are computed again, which saves memory; 0 is faster"


def _evaluation(answers: Answers) -> Iterator[str]:
    yield "hub:"
    yield "  max_lag: 2  # how many versions older than the newest weights a token may be; 0: synchronous"
    yield "evaluation:"
    yield f"  every: {20 if answers.machine.gpus or _is_demo(answers) else 10}  # steps between two evaluations"


def _engine(answers: Answers) -> Iterator[str]:
    machine = answers.machine
    yield "engine:"
    yield f"  kind: {'sglang' if machine.sglang else 'embedded'}  # embedded: inside the actor; sglang: its servers"
    yield f"  device: {'cuda' if machine.gpus else 'cpu'}  # of the engine; the learner takes a GPU if there is one"
    slots = 128 if _is_demo(answers) else 64 * max(1, machine.server_gpus) if machine.gpus else 32
    yield f"  slots: {slots}  # sequences generated together"
    if machine.sglang:
        yield "  sglang:"
        yield f"    servers: {max(1, machine.server_gpus)}  # one on each GPU that does not train"
        yield "    python: .venv-sglang/bin/python  # of SGLang's own environment"


def _local(answers: Answers) -> Iterator[str]:
    machine, small = answers.machine, _is_demo(answers)
    yield "local:"
    yield f"  ranks: {machine.learner_gpus if machine.gpus else 2 if small else 1}  # processes of the learner"
    yield f"  actors: {2 if small and not machine.gpus and not machine.sglang else 1}  # processes that generate"


def _text(value: str) -> str:
    """A text in YAML: quoted unless it is plainly a path or the name of a model."""
    plain = re.fullmatch(r"(\.{0,2}/)?[A-Za-z][\w.-]*(/[\w.-]+)*", value, re.ASCII) or value == BUILTIN_MODEL
    word = value.lower() in ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
    return value if plain and not word else json.dumps(value, ensure_ascii=False)
