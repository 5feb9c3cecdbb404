"""Verifiers: (answer, completion text) -> whether the completion is correct, by name.

"cues" and "chains" are cheap and always return. "math" and "math-tolerance" pass model output to a computer algebra
system and may never return: call them through `sgpo_async.tasks.reward_pool.RewardPool`, which sets a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sgpo_async.tasks import answers, chains_domain, cues_domain
from sgpo_async.tasks.tolerance import Tolerant, all_within, are_small_and_different, elements

Verifier = Callable[[str, str], bool]


def is_math_correct(answer: str, completion: str) -> bool:
    """Whether the completion's last box, or its last expression if it has none, equals the answer (LaTeX or plain).

    math-verify decides it, after `answers.plain` has removed what it misreads. These are decided here: the same text,
    letters of multiple choice, numbers in different bases, and numbers so small that math-verify rounds them to 0.
    """
    wanted, box = answers.plain(answer), answers.final(completion)
    if box is None:
        letter = answers.choice(wanted)
        chosen = letter is not None and _is_chosen(letter, completion)
        return chosen or _are_equal(wanted, answers.readable(completion))
    found = answers.plain(box)
    if wanted == found:
        return bool(found)
    letter, base, other = answers.choice(wanted), answers.in_base(wanted), answers.in_base(found)
    if letter or (base and other):
        return letter == answers.choice(found) if letter else base == other
    return bool(found) and _are_equal(wanted, _boxed(found))


def _are_equal(wanted: str, text: str) -> bool:
    """Whether math-verify finds the answer `wanted` in the text."""
    from math_verify import verify

    gold, target = _parsed(_marked(wanted)), _parsed(text)
    if not verify(gold, target, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    expressions = [one[0] for one in (gold, target) if one and not isinstance(one[0], str)]
    return len(expressions) < 2 or not are_small_and_different(*expressions)


def _is_chosen(letter: str, completion: str) -> bool:
    """Whether a completion without a box gives this letter as its answer."""
    from math_verify import StringExtractionConfig, parse

    letters = StringExtractionConfig(strings=tuple("ABCDEFGHIJ"))
    text = answers.without_fonts(completion).translate(dict.fromkeys(map(ord, "()$*"), " "))
    return letter.lower() in parse(text, [letters], parsing_timeout=None)[:1]


def is_math_correct_within(answer: str, completion: str) -> bool:
    """Whether the completion is correct within the tolerances of `answer`, the text of a `Tolerant`."""
    wanted = Tolerant.from_text(answer)
    if is_math_correct(wanted.answer, completion):
        return True
    parts = ((answers.plain(part), tolerance) for part, tolerance in wanted.parts)
    expected = [(one, tolerance) for part, tolerance in parts for one in _listed(_marked(part))]
    box = answers.final(completion)
    found = answers.readable(completion) if box is None else _boxed(answers.plain(box))
    return bool(expected) and all_within(expected, _listed(found))


def _marked(answer: str) -> str:
    return answer if "$" in answer or answers.BOX in answer else _boxed(answer)


def _boxed(answer: str) -> str:
    return f"{answers.BOX}{{{answer}}}"


def _parsed(text: str) -> list[Any]:
    """The result of math-verify: an expression and its text, only the text, or nothing."""
    from math_verify import parse

    # math-verify's own limits use an alarm handler, which cannot stop a busy C loop and fails in threads.
    return parse(text, parsing_timeout=None)


def _listed(text: str) -> list[Any]:
    expressions = [one for one in _parsed(text) if not isinstance(one, str)]
    return elements(expressions[0]) if expressions else []


VERIFIERS: Mapping[str, Verifier] = {
    "chains": chains_domain.is_correct,
    "cues": cues_domain.is_correct,
    "math": is_math_correct,
    "math-tolerance": is_math_correct_within,
}
INLINE = frozenset({"chains", "cues"})
"""Verifiers that need neither a worker process nor a time limit."""
