"""What a run would find out late: its strategies, its prompts, its rewards, its memory; checked before it starts.

    source ─┬─ problems: how many, with strategies, with responses
            ├─ strategies: whether many of a sample contain the answer
            ├─ prompts: built for a sample and the longest problems, and compared with the model's positions
            └─ rewards: a function or an environment of the user, tried on a few problems
    steps of the run ─── learning rate: whether its warm-up ends
    model's files ─── memory of weights, gradients, optimiser and teacher

Each check returns what it found, and raises CheckFailed, or CheckWarning for what the user should know. They need no
torch, but the tokenizer of a chat template or of a user's prompt does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sgpo_async.cli.resources import size
from sgpo_async.config.schema import Run
from sgpo_async.errors import CheckFailed, CheckWarning
from sgpo_async.model.folder import load_tokenizer, longest_sequence, model_folder, plain_tokenizer, stored_parameters
from sgpo_async.processes.marked import MARK
from sgpo_async.tasks.base import ListedSource, Problem
from sgpo_async.tasks.prompts import build_prompt, check_prompt
from sgpo_async.tasks.rewards import has_own_code
from sgpo_async.tasks.self_check import check_reward
from sgpo_async.tasks.sources import source_of
from sgpo_async.weights.store_file import available_memory

SAMPLE = 256  # problems whose prompts are built, and ...
LONGEST = 64  # ... so many of the longest ones
FEW = 0.5  # of all problems: fewer with strategies are said
LEAKY = 0.1  # of a sample of the strategies: more that leak are said; the check rejects in doubt, so some always may
TRAINED = 8  # bytes per parameter: weights and gradients, in float32
GPU = Path("/dev/nvidia0")


def preflight(run: Run, *, light: bool = False) -> list[str]:
    """Check what the start of a run needs; return what the user should know, a line each.

    Args:
        light: only what needs no torch, and no memory of the learner: for the hub.

    Raises CheckFailed, ConfigError or DataError, one line with the remedy, if the run cannot work.
    """
    source, folder = source_of(run), model_folder(run.model.path)
    tokenizer: Any = plain_tokenizer(folder) if run.tasks.prompt == "plain" else None
    checks: list[Callable[[], str]] = [
        lambda: learning_rate(run),
        lambda: problems(run, source),
        lambda: strategies(run, source),
    ]
    if not light:
        checks.append(lambda: training_memory(run, stored_parameters(run.model.path), gpu_bytes=None))
    if has_own_code(run.tasks) and MARK not in os.environ:  # else the parent process has checked them
        checks.append(lambda: check_reward(run, source.training_problems()))
    if tokenizer or not light:
        checks.append(lambda: prompts(run, source, tokenizer or load_tokenizer(folder), longest_sequence(folder)))
    notes = []
    for check in checks:
        try:
            check()
        except CheckWarning as warning:
            notes.append(str(warning))
    return notes


def learning_rate(run: Run) -> str:
    """Say when the learning rate reaches optim.lr. Raises CheckWarning if the run ends before."""
    warm_up, rate = run.optim.warmup_steps, run.optim.lr
    if run.steps >= warm_up:
        return f"{rate:g} after {warm_up:,} of {run.steps:,} steps" if warm_up else f"{rate:g} from the first step"
    raise CheckWarning(
        f"optim.warmup_steps is {warm_up:,}, and the run has {run.steps:,} steps: the learning rate does not reach "
        f"optim.lr={rate:g}",
        "lower optim.warmup_steps",
    )


def problems(run: Run, source: ListedSource) -> str:
    """Count the problems. Raises CheckWarning if few of them have the strategies that the objective distils."""
    count, place = len(source.training_problems()), run.tasks.path or run.tasks.source
    texts = "strategies" if run.tasks.context == "strategy" else f"the context {run.tasks.context}"
    found = f"{place}: {count:,} problems, {source.strategies:,} with {texts}, {source.responses:,} with responses, "
    found += f"{len(source.held_out()):,} held out"
    if run.needs_strategies and source.strategies < FEW * count:
        without = "distillation" if run.algorithm.objective == "sgpo" else "a context"
        remedy = f"the others train without {without}; sgpo-async strategies extract makes strategies from responses"
        raise CheckWarning(found, remedy)
    return found


def strategies(run: Run, source: ListedSource) -> str:
    """Look for leaks in a sample of the strategies. Raises CheckWarning if more than LEAKY of it leak."""
    if run.tasks.source != "file" or run.tasks.context != "strategy" or not run.needs_strategies:
        return "not used, or of a built-in domain"
    from sgpo_async.strategies import check  # here, because it brings an HTTP client

    training = source.training_problems()
    sample = [one for one in training[:: max(1, len(training) // SAMPLE)] if one.strategy is not None]
    found = list(check(sample))
    text = f"{len(found):,} of {len(sample):,} contain the answer, or a number that only the response has"
    if len(found) <= LEAKY * len(sample):
        return text
    place, leak = found[0]
    remedy = f"`sgpo-async strategies check {run.tasks.path}` names them all"
    raise CheckWarning(f"strategies: {text}, e.g. {place}: {leak}; a policy learns to rely on what it is shown", remedy)


def prompts(run: Run, source: ListedSource, tokenizer: Any, longest: int | None) -> str:
    """Build the prompts of a sample; compare their lengths and rollout.max_new_tokens with the model's positions.

    Args:
        longest: the model's number of positions; None: unknown.

    Raises CheckFailed if the chat template is missing or fails, or if a completion would not fit; CheckWarning if the
    prompts write the date, or if different problems have the same prompt.
    """
    training, warning = source.training_problems(), None
    if run.tasks.prompt != "plain":
        try:
            check_prompt(run, tokenizer, training)
        except CheckWarning as found_there:
            warning = found_there
    step = max(1, len(training) // SAMPLE)
    chosen = [*training[::step], *source.longest_problems(LONGEST), *source.held_out()[:SAMPLE]]
    built = {problem.id: (_built(run, problem, tokenizer), problem) for problem in chosen}
    lengths = {name: (max(map(len, prompts)), problem) for name, (prompts, problem) in built.items()}
    most, worst = max(lengths.values(), key=lambda item: item[0])
    least, more = min(length for length, _ in lengths.values()), run.rollout.max_new_tokens
    found = f"{run.tasks.prompt}: {least:,} to {most:,} tokens"
    if longest is None:
        return f"{found}; the model's config.json has no number of positions"
    if most + more > longest:
        beyond = sum(length + more > longest for length, _ in lengths.values())
        room = longest - most
        found = f"rollout.max_new_tokens: {more} new tokens after {beyond:,} of {len(lengths):,} prompts exceed the"
        found += f" model's {longest} positions; the longest prompt is that of {worst.id}, with {most} tokens"
        lower = f"set rollout.max_new_tokens <= {room}, or " if room > 0 else ""
        raise CheckFailed(found, f"{lower}shorten or remove these problems")
    texts = {problem.problem for _, problem in built.values()}
    shown = {tuple(prompts[0]) for prompts, _ in built.values()}
    if len(shown) < len(texts):
        raise CheckWarning(
            f"{len(texts):,} problems have only {len(shown):,} different prompts: model.path={run.model.path} does not "
            "know their words",
            "name the model that is to learn them",
        )
    if warning:
        raise warning
    return f"{found}, with completions up to {most + more:,} of {longest:,} positions"


def training_memory(run: Run, parameters: int, *, gpu_bytes: int | None) -> str:
    """Compare the memory that training needs at least, without activations, with the memory there is.

    Args:
        gpu_bytes: of each GPU, if the ranks use GPUs; None: unknown, or on the CPU.

    Raises CheckFailed if it cannot suffice.
    """
    ranks = int(os.environ.get("WORLD_SIZE", run.local.ranks))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    width = {"float32": 4, "bfloat16": 2}
    copies = run.copies_teacher + run.copies_reference
    teacher = width[run.algorithm.teacher_dtype] * copies
    adapters = run.learner.lora.rank > 0  # then only they have gradients and moments, and they are small
    nbytes = width[run.model.dtype] if adapters else TRAINED + run.optim.state_bytes + teacher
    each = int(parameters * nbytes) // run.learner.shards(ranks=ranks, here=here)
    parts = f"weights{'' if adapters else ', gradients, AdamW'}{', teacher' * run.copies_teacher}"
    parts += ", reference" * run.copies_reference
    what = f"{size(each)} in each of {ranks} ranks: {parts}"
    remedy = "use more ranks or a smaller model" + (
        ", or algorithm.teacher_dtype=bfloat16" if teacher == 4 * copies > 0 else ""
    )
    in_ram = run.learner.offload_weights or (gpu_bytes is None and not GPU.exists())
    needed, available = each * here if in_ram else 0, available_memory()
    if gpu_bytes is not None and each > gpu_bytes and not in_ram:
        raise CheckFailed(f"{what}, and a GPU has {size(gpu_bytes)}", remedy)
    if needed > available:
        raise CheckFailed(
            f"{what}; {here} ranks need {size(needed)} of memory here, and {size(available)} are free", remedy
        )
    return what


def _built(run: Run, problem: Problem, tokenizer: Any) -> list[list[int]]:
    """The prompts of a problem: the plain one, and the one with the strategy if it has one and the run reads it."""
    read = run.rollout.guided or run.algorithm.reads_in_context
    strategies = dict.fromkeys([None, problem.strategy if read else None])
    return [build_prompt(problem.problem, one, tasks=run.tasks, tokenizer=tokenizer) for one in strategies]
