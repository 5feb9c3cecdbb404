"""Builds prompts: the autonomous one shows the problem, pi(.|q); the guided one adds the strategy, pi(.|q,s).

With another `tasks.context` its text is the strategy here (`tasks.contexts`), and a chat message introduces it as such.

    tasks.prompt=plain              for base policies: strategy, newline, problem, and no special token
    tasks.prompt=chat               for instruction-tuned models: the tokenizer's chat template
    tasks.prompt=module:function    a user's own function of problem, strategy (or None) and tokenizer

`check_prompt` finds what is wrong with a prompt before a run starts.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sgpo_async.config.schema import Context, Run, Tasks
from sgpo_async.errors import CheckFailed, CheckWarning, DataError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.functions import describe, import_function

STRATEGY = """Follow this strategy:

<strategy>
{context}
</strategy>"""

SOLUTION = """Here is a solution of it:

<solution>
{context}
</solution>

Understand why its steps are right, then solve the problem by your own reasoning."""

PARTIAL_SOLUTION = """Here is how a solution of it begins:

<beginning>
{context}
</beginning>

Understand which steps it has taken, and continue from there to a complete solution."""

ANSWER = """Its answer is {context}. Find the reasoning that leads there, and show every step."""

ASKED: dict[Context, str] = {
    "strategy": STRATEGY,
    "other-strategy": STRATEGY,
    "response": SOLUTION,
    "sibling": SOLUTION,
    "partial-response": PARTIAL_SOLUTION,
    "answer": ANSWER,
}

GUIDED_MESSAGE = """Solve the problem below. {asked}

Problem:
{problem}"""

SAMPLE_STRATEGY = "Split the problem into steps, and check each step."  # for a check, where no problem has a strategy
SAMPLES = 8  # problems that a check looks at
NOW = (datetime.datetime(2024, 2, 29, 23, 59, 59), datetime.datetime(2031, 10, 7, 6, 5, 4))  # two pretended times


def build_prompt(problem: str, strategy: str | None, *, tasks: Tasks, tokenizer: Any) -> list[int]:
    """Token ids of the prompt; without a strategy it contains only the problem.

    Raises DataError if the tokenizer has no chat template but `tasks.prompt=chat`, or if the template or the user's
    function fails.
    """
    if tasks.prompt == "plain":
        text = problem + tasks.suffix if strategy is None else f"{strategy}\n{problem}{tasks.suffix}"
        return list(tokenizer.encode(text, add_special_tokens=False))
    if tasks.prompt == "chat":
        return _from_template(chat(problem, strategy, tasks), tokenizer, **tasks.template_args)
    return _from_function(tasks.prompt, problem, strategy, tokenizer)


def build_reply(reply: str, *, tasks: Tasks, tokenizer: Any, end: int = -1) -> list[int]:
    """Token ids of an environment's reply, with all that stands between the policy's end token and its next completion.

    With `tasks.prompt=chat` that is what the chat template writes around a message of `tasks.reply_role`; otherwise it
    is the reply itself. Special tokens that the reply spells are left out: it can end no turn and begin none.

    Args:
        end: the last token of the completion, which the template writes as well.

    Raises DataError if the template fails, or if the reply has no token.
    """
    before = after = ""
    if tasks.prompt == "chat":
        marks = [{"role": "assistant", "content": "COMPLETION"}, {"role": tasks.reply_role, "content": "REPLY"}]
        messages = [*chat("PROBLEM", None, tasks), *marks]
        _, found, rest = _render(messages, tokenizer, **tasks.template_args).rpartition("COMPLETION")
        before, again, after = rest.partition("REPLY")
        if not found or not again:
            raise DataError(
                f"tasks.reply_role: the chat template of {tokenizer.name_or_path} writes no completion followed by a "
                f"message of {tasks.reply_role}; choose another role or tasks.prompt"
            )
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    own = [token for token in tokenizer.encode(reply, add_special_tokens=False) if token not in special]
    if not own:
        raise DataError(f"tasks.environment: the reply {reply!r:.80} has no token")
    first, last = (list(tokenizer.encode(text, add_special_tokens=False)) if text else [] for text in (before, after))
    return [*(first[1:] if first[:1] == [end] else first), *own, *last]


def prompt_settings(tasks: Tasks) -> dict[str, Any]:
    """The settings that prompts depend on; those that have their default are left out, except the style."""
    return {"prompt": tasks.prompt, **tasks.changed("system", "template_args", "context", "strategy_place", "suffix")}


def chat(problem: str, strategy: str | None, tasks: Tasks) -> list[dict[str, str]]:
    """The messages of `tasks.prompt=chat`."""
    content, system = problem + tasks.suffix, [tasks.system] if tasks.system else []
    if strategy is not None:
        asked = ASKED.get(tasks.context, STRATEGY).format(context=strategy)
        if tasks.strategy_place == "system":
            system.append(asked)
        else:
            content = GUIDED_MESSAGE.format(asked=asked, problem=content)
    messages = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return [*messages, {"role": "user", "content": content}]


def check_prompt(run: Run, tokenizer: Any, problems: Sequence[Problem]) -> str:
    """Build prompts of a sample of problems, and say what was found.

    Raises CheckFailed, with a remedy, if the chat template is missing, malformed or raises, if the user's function
    fails, or if problem, strategy or system message make no difference to the prompt. Raises CheckWarning if the same
    problem gives different prompts at different times: the template writes the date or the time of day.
    """
    tasks = run.tasks
    sample = problems[:SAMPLES]
    strategy = next((one.strategy for one in sample if one.strategy), SAMPLE_STRATEGY)
    texts = list(dict.fromkeys([one.problem for one in sample] or ["?"]))
    remedy = "correct it, or choose another tasks.prompt"

    def built(text: str, strategy: str | None, settings: Tasks = tasks) -> list[int]:
        return build_prompt(text, strategy, tasks=settings, tokenizer=tokenizer)

    try:
        if tasks.environment:
            build_reply("0", tasks=tasks, tokenizer=tokenizer)
        plain = [built(text, None) for text in texts]
        guided = [built(text, strategy) for text in texts]
        shown = {tuple(ids) for ids in plain}
        system_ignored = tasks.system and built(texts[0], None, replace(tasks, system="")) == plain[0]
    except DataError as error:
        found, _, own = str(error).partition("; ")
        raise CheckFailed(found, own or remedy) from error
    if len(shown) < len(texts):
        raise CheckFailed(f"tasks.prompt: {tasks.prompt} gives the same prompt for different problems", remedy)
    if any(a == b for a, b in zip(plain, guided, strict=True)):
        found = f"tasks.prompt: {tasks.prompt} gives the same prompt with and without a strategy"
        in_system = "set tasks.strategy_place=user: the template ignores system messages"
        raise CheckFailed(found, in_system if tasks.strategy_place == "system" else remedy)
    if system_ignored:
        raise CheckFailed("tasks.system: the chat template ignores the system message", "put it into tasks.suffix")
    if [built(text, None) for text in texts] != plain or _varies_with_time(tasks, texts[0], tokenizer):
        raise CheckWarning(
            f"tasks.prompt: {tasks.prompt} gives different prompts for the same problem at different times",
            "set the date that the template writes in tasks.template_args, e.g. {date_string: 26 Jul 2024}",
        )
    lengths = [len(ids) for ids in plain + guided]
    return (
        f"{tasks.prompt}: {min(lengths)} to {max(lengths)} tokens, of {len(texts)} problems with and without strategy"
    )


def _varies_with_time(tasks: Tasks, problem: str, tokenizer: Any) -> bool:
    """Whether the chat template writes the time: the same messages, rendered at two pretended times."""
    if tasks.prompt != "chat":
        return False
    clocks: list[Callable[[str], str]] = [now.strftime for now in NOW]
    messages = chat(problem, None, tasks)
    first, second = (_from_template(messages, tokenizer, strftime_now=now, **tasks.template_args) for now in clocks)
    return first != second


def _from_template(messages: list[dict[str, str]], tokenizer: Any, **arguments: Any) -> list[int]:
    return list(_render(messages, tokenizer, tokenize=True, return_dict=True, **arguments)["input_ids"])


def _render(messages: list[dict[str, str]], tokenizer: Any, *, tokenize: bool = False, **arguments: Any) -> Any:
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path
        raise DataError(f"tasks.prompt: chat, but the tokenizer {name} has no chat template; use plain")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize, **arguments)
    except Exception as error:  # a template is code of the tokenizer's author
        system = messages[0]["role"] == "system"
        hint = "; if it takes no system message, remove tasks.system and tasks.strategy_place" if system else ""
        raise DataError(
            f"tasks.prompt: chat: the chat template of {tokenizer.name_or_path} fails ({describe(error)}){hint}"
        ) from error


def _from_function(name: str, problem: str, strategy: str | None, tokenizer: Any) -> list[int]:
    function = import_function("tasks.prompt", name)
    try:
        prompt = function(problem, strategy, tokenizer)
    except Exception as error:
        raise DataError(f"tasks.prompt: {name} raised {describe(error)} for the problem {problem!r:.80}") from error
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, add_special_tokens=False)
    ids = list(prompt) if isinstance(prompt, Sequence) or hasattr(prompt, "tolist") else []
    if not ids or not all(hasattr(one, "__index__") and not isinstance(one, bool) for one in ids):
        raise DataError(
            f"tasks.prompt: {name} must return a text or token ids, at least one, got {prompt!r:.80} for the problem "
            f"{problem!r:.80}; correct the function"
        )
    return [int(one) for one in ids]
