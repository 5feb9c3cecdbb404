"""Verifiers: (answer, completion text) -> whether the completion is correct, by name.

"cues" is cheap and always returns. "math" hands text from a model to a computer algebra system and may take
for ever: call it through `sgpo_async.tasks.reward_pool.RewardPool`, which sets a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sgpo_async.tasks import cues_domain

Verifier = Callable[[str, str], bool]


def is_math_correct(answer: str, completion: str) -> bool:
    """Whether math-verify finds the completion's last expression equal to the answer (LaTeX or plain)."""
    from math_verify import parse, verify

    marked = answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
    # math-verify's own limits are set by an alarm, which a busy C loop outlives and threads forbid.
    gold = parse(marked, parsing_timeout=None)
    found = parse(completion, parsing_timeout=None)
    return bool(verify(gold, found, timeout_seconds=None))


VERIFIERS: Mapping[str, Verifier] = {"cues": cues_domain.is_correct, "math": is_math_correct}
INLINE = frozenset({"cues"})
"""Verifiers that need neither a process of their own nor a time limit."""
