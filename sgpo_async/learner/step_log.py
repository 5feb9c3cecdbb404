"""The learner's log lines about its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from sgpo_async.config.schema import OTHERS_KEPT
from sgpo_async.logs import fields
from sgpo_async.report.numbers import number, percent

log = logging.getLogger(__name__)

EVERY_S = 1.0  # at most one line at level info in this time; the steps between have lines at level debug
KEYS = ("loss", "pass_auto", "pass_guided", "eval_pass_auto", "eval_pass_guided", "tokens_per_s", "lag_mean", "lag_max")


class StepLog:
    """Logs the steps of a run of `steps` steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._next = 0.0
        self._warned = False

    def step(self, line: Mapping[str, Any], *, seconds: float) -> None:
        """Log one line of metrics.jsonl; `seconds`: how long the step took."""
        self._warn_of_kept(line.get("kept_mean"))
        now, measured = time.monotonic(), line.get("eval_pass_auto") is not None
        shown = now >= self._next or measured or line["step"] == self._steps
        if shown:
            self._next = now + EVERY_S
        known = {key: line[key] for key in KEYS if line.get(key) is not None}
        values = fields(event="step", step=line["step"], steps=self._steps, seconds=round(seconds, 3), **known)
        log.log(logging.INFO if shown else logging.DEBUG, "%s", self._text(line, seconds), extra=values)

    def _warn_of_kept(self, mean: float | None) -> None:
        """Say once that rollouts are larger than the estimate from which `hub.max_message_mb` was checked."""
        if mean is None or mean - 1 <= OTHERS_KEPT or self._warned:
            return
        self._warned = True
        log.warning(
            "rollout.top_p and rollout.top_k keep %.0f tokens on average, but the estimate of the hub's state counts "
            "%d; if its messages exceed hub.max_message_mb, the run ends: raise it, or lower rollout.top_k",
            mean,
            OTHERS_KEPT + 1,
        )

    def _text(self, line: Mapping[str, Any], seconds: float) -> str:
        get = line.get
        parts = [f"step {line['step']}/{self._steps}", f"loss {number(get('loss'))}"]
        parts += [f"pass {percent(get('pass_auto'))} alone, {percent(get('pass_guided'))} guided"]
        if get("eval_pass_auto") is not None:
            parts += [f"held-out {percent(get('eval_pass_auto'))}, {percent(get('eval_pass_guided'))}"]
        parts += [f"{number(get('tokens_per_s'))} tokens/s", f"lag {number(get('lag_mean'))}", f"{number(seconds)} s"]
        return "  ".join(parts)
