"""What the user sees during a run: a live picture at a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sgpo_async.logs import one_line
from sgpo_async.metrics.canary import alarm_text
from sgpo_async.metrics.mismatch import SPANS, alarms
from sgpo_async.report.numbers import NONE, clock, number, percent, scientific

MAX_WORD = 64  # characters
LINE = 400  # ... of a completion


@dataclass(frozen=True, kw_only=True)
class View:
    """The state of the run at one moment."""

    name: str
    phase: str
    steps: int
    elapsed_s: float
    metrics: Mapping[str, Any]  # the newest value of each metric
    history: list[dict[str, Any]]  # every line of metrics.jsonl
    status: Mapping[str, Any]  # the hub's
    actors: Mapping[str, str]  # state of each by name, as the supervisor knows it: started, restarting, ...
    notes: list[str] = field(default_factory=list)
    sample: Mapping[str, Any] | None = None  # the newest line of samples.jsonl
    details: bool = False  # show everything that the hub says
    dashboard: str = ""  # URL of the hub's dashboard; "": none

    @property
    def step(self) -> int:
        """Number of optimiser steps done."""
        return max(self.metrics.get("step", 0), self.status.get("step", 0))

    def get(self, key: str) -> Any:
        """The newest value of a metric: the hub's, which is fresher, or that of the last step."""
        value = self.status.get(key)
        return self.metrics.get(key) if value is None else value

    def lag(self) -> str:
        """Mean and largest lag of the last batch, in versions."""
        lag = self.status.get("lag") or {}
        mean, most = lag.get("mean", self.metrics.get("lag_mean")), lag.get("max", self.metrics.get("lag_max"))
        return NONE if mean is None else f"{mean:.2f} (max {number(most)})"

    def held_out(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The first and the last evaluation; empty if there has been none."""
        rounds = self.status.get("evaluations") or []
        return (rounds[0], rounds[-1]) if rounds else ({}, {})

    def benchmarks(self) -> list[Mapping[str, Any]]:
        """The newest score of each, as `BenchmarkScore`; empty before the first evaluation or without benchmarks."""
        newest = dict(self.metrics.get("eval_benchmarks") or {})
        for evaluation in self.status.get("evaluations") or []:
            for score in evaluation.get("benchmarks") or []:
                if score["avg"] is not None or score["name"] not in newest:  # None: no problem could be served
                    newest[score["name"]] = score
        return list(newest.values())

    def tokens_per_s(self) -> str:
        """Tokens that all engines generate per second."""
        return number(self.metrics.get("tokens_per_s") or sum(row.get("tokens_per_s") or 0 for row in self.rows()))

    def rows(self) -> list[Mapping[str, Any]]:
        """One row per actor: from the hub, or from the supervisor for an actor that the hub does not know."""
        said = self.status.get("actors") or []
        known = {
            str(row["name"]): {**row, "name": _word(row["name"]), "state": _word(row.get("state") or NONE)}
            for row in said
        }
        ours = [known.pop(name, {"name": name, "state": state}) for name, state in self.actors.items()]
        return ours + list(known.values())  # the rest were started outside of this run

    def completion(self) -> tuple[bool, str] | None:
        """Whether the first completion of the newest sample is correct, and its text in one line; None: no sample."""
        if not self.sample or not self.sample["rollouts"]:
            return None
        rollout = self.sample["rollouts"][0]
        return rollout["correct"], one_line(rollout["text"], LINE)

    def mismatch(self) -> str:
        """The last measured mismatch between engine and learner at lag 0: the larger of the two kinds of spans."""
        means = [self.metrics.get(f"mismatch_mean_lag0_{span}") for span in SPANS]
        known = [mean for mean in means if mean is not None]
        return f"{scientific(max(known))} nats" if known else NONE

    def canary(self) -> str:
        """The largest difference of an engine from the learner on the canary."""
        largest = self.get("canary_max")
        return NONE if largest is None else f"{scientific(largest)} nats"

    def alarm(self) -> str:
        """A message if the mismatch was above its bound in any step, or engines serve wrong weights; else empty."""
        found = alarms(self.history)
        mismatch = f"mismatch alarm no. {len(found)}: {found[-1].text}" if found else ""
        return "\n".join(filter(None, [mismatch, alarm_text(self.get("canary_alarms"))]))

    def remaining_s(self) -> float | None:
        """Estimated seconds to the end, from the duration of the steps so far."""
        wall, step = self.metrics.get("wall_s"), self.metrics.get("step", 0)
        return wall / step * (self.steps - step) if wall and step else None


def _word(value: object) -> str:
    """A name or a state that a member chose."""
    return one_line(value, MAX_WORD)


class Display(Protocol):
    """Shows one view after another."""

    def show(self, view: View) -> None:
        """Show the current state of the run."""

    def close(self) -> None:
        """Release the terminal."""


class Lines:
    """For logs and pipes: a line when the phase changes, for each note, and every `every_s` seconds.

    A first alarm is printed at once; a changed alarm is printed with the next regular line.
    """

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._next = 0.0
        self._phase = ""
        self._notes = 0
        self._alarm = ""
        self._dashboard = ""

    def show(self, view: View) -> None:
        """Print new notes and, if it is time, a line about the run."""
        for note in view.notes[self._notes :]:
            print(f"[{clock(view.elapsed_s):>5}] {note}", flush=True)
        self._notes = len(view.notes)
        if view.dashboard not in ("", self._dashboard):
            self._dashboard = view.dashboard
            print(f"[{clock(view.elapsed_s):>5}] dashboard: {view.dashboard}", flush=True)
        due = view.phase != self._phase or time.monotonic() >= self._next
        alarm = view.alarm()
        if alarm != self._alarm and (due or not self._alarm):
            self._alarm = alarm
            print(f"[{clock(view.elapsed_s):>5}] {alarm}", flush=True)
        if due:
            self._phase = view.phase
            self._next = time.monotonic() + self._every_s
            print(f"[{clock(view.elapsed_s):>5}] {line(view)}", flush=True)

    def close(self) -> None:
        """There is nothing to release."""


def line(view: View) -> str:
    """The view in one line."""
    if not view.step:
        states = ", ".join(f"{row['name']} {row.get('state') or NONE}" for row in view.rows())
        return f"{view.phase}; {states}"
    _, held_out = view.held_out()
    return "  ".join(
        [
            f"step {view.step}/{view.steps}",
            f"pass {percent(view.get('pass_auto'))} alone, {percent(view.get('pass_guided'))} guided",
            f"(held-out {percent(held_out.get('pass_auto'))}, {percent(held_out.get('pass_guided'))})",
            f"alpha {number(view.get('alpha'))}",
            f"lag {view.lag()}",
            f"{view.tokens_per_s()} tokens/s",
            f"idle: trainer {percent(view.get('learner_idle'))}, engines {percent(view.get('engine_idle'))}",
        ]
    )
