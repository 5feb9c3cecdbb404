"""Texts from outside (completions, names, logs) made fit to be shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sgpo_async.report.numbers import number

LEFT_OUT = (
    "Tokens that are struck through are not distilled: the first algorithm.distil_skip of a completion, those that "
    "algorithm.limiter (such as the mask of Eq. 5) or algorithm.kl_correction removes from the loss, those that an "
    "environment wrote, and stale ones with hub.stale=mask."
)


BEGINNING = 80  # characters of a completion that is shown in full elsewhere


class Run(NamedTuple):
    """A part of a completion."""

    text: str
    kl: float | None = None  # its divergence d_t in nats, if it is known
    left_out: bool = False  # it is not distilled, although the completion is


def runs_of(rollout: Mapping[str, Any], *, chars: int) -> list[Run]:
    """Return a completion of samples.jsonl token by token if it was distilled, else whole; not yet printable.

    Of a completion with more than `chars` characters, the middle is left out, with a note of how many; 0: never.
    """
    if "kl" in rollout:
        places = left_out_of(rollout)
        tokens = enumerate(zip(rollout["pieces"], rollout["kl"], strict=True))
        runs = [Run(text, kl, place in places) for place, (text, kl) in tokens]
    else:
        runs = [Run(rollout["text"])]
    total = sum(len(run.text) for run in runs)
    if not chars or total <= chars:
        return runs
    head = _first(runs, chars // 2)
    tail = _backwards(_first(_backwards(runs), chars // 2))
    return [*head, Run(f" [... {total - 2 * (chars // 2):,} characters ...] "), *tail]


def left_out_of(rollout: Mapping[str, Any]) -> set[int]:
    """The tokens of a distilled completion that are not distilled; of an older file only those without a divergence."""
    missing = (place for place, kl in enumerate(rollout["kl"]) if kl is None)
    return set(rollout.get("left_out", missing))


def _backwards(runs: Sequence[Run]) -> list[Run]:
    return [run._replace(text=run.text[::-1]) for run in reversed(runs)]


def _first(runs: Iterable[Run], chars: int) -> list[Run]:
    """Return the first `chars` characters."""
    kept: list[Run] = []
    for run in runs:
        if chars <= 0:
            break
        kept.append(run._replace(text=run.text[:chars]))
        chars -= len(run.text)
    return kept


def strength(kl: float | None) -> float:
    """Map a divergence to [0, 1) for its shading: 0.1 nats to 0.10, 1 to 0.63, 3 to 0.95."""
    return 1 - math.exp(-max(kl or 0.0, 0.0))


def solved(sample: Mapping[str, Any], *, guided: bool = False) -> tuple[int, int]:
    """Return how many of the autonomous or guided rollouts of a sample are correct, and how many there are."""
    verdicts = [rollout["correct"] for rollout in sample["rollouts"] if rollout["guided"] == guided]
    return sum(verdicts), len(verdicts)


def alike(rollouts: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """Return each rollout that differs from those before it in what is shown of it, and how many are like it.

    Distilled completions, and those with a context of their own, are never put together.
    """
    shown: dict[object, tuple[Mapping[str, Any], int]] = {}
    for rollout in rollouts:
        alone = {"kl", "sibling"} & rollout.keys()
        what = ("text", "correct", "reward", "finish", "tokens")
        key = len(shown) if alone else (*(rollout[name] for name in what), versions_of(rollout))
        first, count = shown.get(key, (rollout, 0))
        shown[key] = first, count + 1
    return list(shown.values())


def context_of(sample: Mapping[str, Any]) -> str:
    """What the guided prompts of a sample hold beside the problem: the strategy, or another `tasks.context`."""
    return str(sample.get("context") or "strategy").replace("-", " ")


def notes_of(rollout: Mapping[str, Any], count: int = 1) -> str:
    """Return what else is to be said of `count` rollouts: a reward other than 0 and 1, an end by max_new_tokens."""
    notes = [f"{count} times"] if count > 1 else []
    notes += [] if rollout["reward"] in (0, 1) else [f"reward {number(rollout['reward'])}"]
    notes += [] if rollout["finish"] == "stop" else ["cut off: max_new_tokens"]
    return ", ".join(notes)


def sibling_note(rollout: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """Return how the completion of its group begins that the teacher read as the context; "" if it read none."""
    found = (other["text"] for other in sample["rollouts"] if other["slot"] == rollout.get("sibling"))
    return "".join(f"context of the teacher: the completion that begins {text[:BEGINNING]!r}" for text in found)


def distilled_note(rollout: Mapping[str, Any]) -> str:
    """Return that a completion is distilled, and how many of its tokens if not all; "" if it is not."""
    if "kl" not in rollout:
        return ""
    count, left_out = len(rollout["kl"]), len(left_out_of(rollout))
    return f"{count - left_out:,} of {count:,} tokens distilled" if left_out else "distilled"


def versions_of(rollout: Mapping[str, Any]) -> str:
    """Return the weight versions that sampled the spans of a rollout: 7, or 7-9; without spans of an environment."""
    versions = [version for version in rollout["versions"] if version >= 0]
    return str(versions[0]) if len(set(versions)) == 1 else f"{min(versions)}-{max(versions)}"
