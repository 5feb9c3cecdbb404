"""Texts from outside (completions, names, logs) made fit to be shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sgpo_async.report.numbers import number

Run = tuple[str, float | None]
"""A part of a completion, and its divergence d_t in nats; None if it was not distilled."""


def runs_of(rollout: Mapping[str, Any], *, chars: int) -> list[Run]:
    """Return a completion of samples.jsonl token by token if it was distilled, else whole; not yet printable.

    Of a completion with more than `chars` characters, the middle is left out, with a note of how many; 0: never.
    """
    if "kl" in rollout:
        runs: list[Run] = list(zip(rollout["pieces"], rollout["kl"], strict=True))
    else:
        runs = [(rollout["text"], None)]
    total = sum(len(text) for text, _ in runs)
    if not chars or total <= chars:
        return runs
    head = _first(runs, chars // 2)
    tail = [(text[::-1], kl) for text, kl in reversed(_first([(t[::-1], k) for t, k in reversed(runs)], chars // 2))]
    return [*head, (f" [... {total - 2 * (chars // 2):,} characters ...] ", None), *tail]


def _first(runs: Iterable[Run], chars: int) -> list[Run]:
    """Return the first `chars` characters."""
    kept: list[Run] = []
    for text, kl in runs:
        if chars <= 0:
            break
        kept.append((text[:chars], kl))
        chars -= len(text)
    return kept


def strength(kl: float | None) -> float:
    """Map a divergence to [0, 1) for its shading: 0.1 nats to 0.10, 1 to 0.63, 3 to 0.95."""
    return 1 - math.exp(-max(kl or 0.0, 0.0))


def solved(sample: Mapping[str, Any], *, guided: bool = False) -> tuple[int, int]:
    """Return how many of the autonomous or guided rollouts of a sample are correct, and how many there are."""
    verdicts = [rollout["correct"] for rollout in sample["rollouts"] if rollout["guided"] == guided]
    return sum(verdicts), len(verdicts)


def context_of(sample: Mapping[str, Any]) -> str:
    """What the guided prompts of a sample hold beside the problem: the strategy, or another `tasks.context`."""
    return str(sample.get("context") or "strategy").replace("-", " ")


def notes_of(rollout: Mapping[str, Any]) -> str:
    """Return what else is to be said of a rollout: a reward other than 0 and 1, an end by max_new_tokens."""
    notes = [] if rollout["reward"] in (0, 1) else [f"reward {number(rollout['reward'])}"]
    notes += [] if rollout["finish"] == "stop" else ["cut off: max_new_tokens"]
    return ", ".join(notes)


def versions_of(rollout: Mapping[str, Any]) -> str:
    """Return the weight versions that sampled the spans of a rollout: 7, or 7-9; without spans of an environment."""
    versions = [version for version in rollout["versions"] if version >= 0]
    return str(versions[0]) if len(set(versions)) == 1 else f"{min(versions)}-{max(versions)}"
