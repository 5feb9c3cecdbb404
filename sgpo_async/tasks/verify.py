"""Verifiers: (answer, completion text) -> whether the completion is correct, by name.

"cues" is cheap and always returns. "math" and "math-tolerance" pass model output to a computer algebra system and may
never return: call them through `sgpo_async.tasks.reward_pool.RewardPool`, which sets a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sgpo_async.tasks import cues_domain
from sgpo_async.tasks.tolerance import Tolerant, all_within, elements

Verifier = Callable[[str, str], bool]


def is_math_correct(answer: str, completion: str) -> bool:
    """Whether math-verify finds the completion's last expression equal to the answer (LaTeX or plain)."""
    from math_verify import verify

    return bool(verify(_parsed(_marked(answer)), _parsed(completion), timeout_seconds=None))


def is_math_correct_within(answer: str, completion: str) -> bool:
    """Whether the completion is correct within the tolerances of `answer`, the text of a `Tolerant`."""
    wanted = Tolerant.from_text(answer)
    if is_math_correct(wanted.answer, completion):
        return True
    answers = [(one, tolerance) for part, tolerance in wanted.parts for one in _listed(_marked(part))]
    return bool(answers) and all_within(answers, _listed(completion))


def _marked(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"


def _parsed(text: str) -> list[Any]:
    """The result of math-verify: an expression and its text, only the text, or nothing."""
    from math_verify import parse

    # math-verify's own limits use an alarm handler, which cannot stop a busy C loop and fails in threads.
    return parse(text, parsing_timeout=None)


def _listed(text: str) -> list[Any]:
    expressions = [one for one in _parsed(text) if not isinstance(one, str)]
    return elements(expressions[0]) if expressions else []


VERIFIERS: Mapping[str, Verifier] = {
    "cues": cues_domain.is_correct,
    "math": is_math_correct,
    "math-tolerance": is_math_correct_within,
}
INLINE = frozenset({"cues"})
"""Verifiers that need neither a worker process nor a time limit."""
