"""Builds prompts: the autonomous one shows the problem, pi(.|q); the guided one adds the strategy, pi(.|q,s).

Style "plain" is for base policies: strategy, newline, problem, and no special token. Style "chat" is for
instruction-tuned models: one user message through the tokenizer's chat template, with the generation prompt.
"""

from __future__ import annotations

from typing import Any, Literal

from sgpo_async.errors import DataError

Style = Literal["plain", "chat"]

GUIDED_MESSAGE = """Solve the problem below. Follow this strategy:

<strategy>
{strategy}
</strategy>

Problem:
{problem}"""


def build_prompt(problem: str, strategy: str | None, *, style: Style, tokenizer: Any) -> list[int]:
    """Token ids of the prompt; without a strategy it contains only the problem.

    Raises DataError if the style is "chat" and the tokenizer has no chat template.
    """
    if style == "plain":
        text = problem if strategy is None else f"{strategy}\n{problem}"
        return list(tokenizer.encode(text, add_special_tokens=False))
    if not tokenizer.chat_template:
        raise DataError(f"prompt style: chat, but tokenizer {tokenizer.name_or_path} has no chat template; use plain")
    content = problem if strategy is None else GUIDED_MESSAGE.format(strategy=strategy, problem=problem)
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])
