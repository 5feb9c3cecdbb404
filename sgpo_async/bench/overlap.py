"""Does asynchrony pay? Equal work synchronous, colocated and asynchronous, in simulated runs with the hub's real core.

    sgpo-async bench overlap [--quick] [--to DIR]

    synchronous        all GPUs generate a batch, then all train it; changing over costs nothing
    colocated          the same, and changing over takes SWITCH_S each way
    split, lag 0       some GPUs generate, the others train; each side waits for the other
    lag N              the same division into two sides, hub.max_lag=N, updates in flight
    lag N, no updates  engines load a version only when nothing runs any more

Each row has the division of the GPUs that the closed form finds best for it. All rows have the same problems, lengths
and rewards. "of bound" is how far the busier side is used: the share of time in which the learner trains, or the tokens
that the engines generate, of those that they would without a learner. Rates come from `simulation.hardware`: what GPUs
reach there is stated, not measured here.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgpo_async.bench.figures import as_json
from sgpo_async.files import write_whole
from sgpo_async.simulation import Lengths, Outcome, Settings, generation_bound, simulate
from sgpo_async.simulation.advice import best, divided, divisions
from sgpo_async.simulation.hardware import QWEN_1_5B, QWEN_7B, Hardware, Shape, engine_rates, learner_rates

SWITCH_S = 5.0  # to free the keys and values, gather or scatter the weights, and warm up
LAGS = (1, 2, 4, 8)
GPU = Hardware()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model, a number of GPUs, and the work."""

    name: str
    shape: Shape
    gpus: int
    problems: int
    slots: int
    lengths: Lengths
    steps: int

    @property
    def base(self) -> Settings:
        """The run on two GPUs."""
        return Settings(
            nodes=1,
            engine=engine_rates(self.shape, GPU, slots=self.slots),
            learner=learner_rates(self.shape, GPU, ranks=1),
            lengths=self.lengths,
            problems=self.problems,
            steps=self.steps,
        )


LONG = Lengths(longest=16_384, median=1000, sigma=1.2)  # reasoning: the mean is about 2,000 tokens
SHORT = Lengths(longest=4096, median=500, sigma=0.8)
SCENARIOS = (
    Scenario(name="7B on 8 GPUs, up to 16,384 tokens", shape=QWEN_7B, gpus=8, problems=64, slots=64, lengths=LONG,
             steps=12),
    Scenario(name="1.5B on 8 GPUs, up to 4,096 tokens", shape=QWEN_1_5B, gpus=8, problems=64, slots=128, lengths=SHORT,
             steps=12),
)  # fmt: skip
QUICK = (replace(SCENARIOS[0], problems=32, steps=8),)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting, and what its simulated runs gave, one for each seed."""

    name: str
    settings: Settings
    outcomes: Sequence[Outcome]
    alone: Sequence[float]  # tokens per second that the same engines generate without a learner

    def median(self, name: str) -> float:
        """Median over the seeds of an attribute of the outcomes."""
        return statistics.median(getattr(one, name) for one in self.outcomes)

    @property
    def of_bound(self) -> float:
        """How far the busier side is used, median."""
        return statistics.median(
            max(one.learner.get("trains", 0.0), one.generated_tokens / one.seconds / alone)
            for one, alone in zip(self.outcomes, self.alone, strict=True)
        )

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "setting": self.name,
            "ranks": self.settings.learner.ranks,
            "nodes": self.settings.nodes,
            "max_lag": self.settings.max_lag,
            "of_bound": self.of_bound,
            "seeds": [
                one.plain() | {"alone_tokens_per_s": alone}
                for one, alone in zip(self.outcomes, self.alone, strict=True)
            ],
        }


def run_bench_overlap(*, quick: bool, to: Path) -> int:
    """Simulate every scenario; print tables, write overlap.txt and overlap.json into `to`."""
    texts, found = [], []
    for scenario in QUICK if quick else SCENARIOS:
        rows = []
        for name, settings in rows_of(scenario):
            print(f"simulating {scenario.name}: {name} ...", file=sys.stderr, flush=True)
            rows.append(_measure(name, settings, seeds=range(1 if quick else 3)))
        texts.append(_table(scenario, rows))
        print(texts[-1], flush=True)
        found.append({"scenario": scenario.name, "rows": [row.plain() for row in rows]})
        write_whole(to / "overlap.txt", "\n".join(texts))
        write_whole(to / "overlap.json", as_json(found))
    return 0


def rows_of(scenario: Scenario) -> Iterator[tuple[str, Settings]]:
    """The settings that are compared, each with its best division of the GPUs."""
    base, shape, gpus = scenario.base, scenario.shape, scenario.gpus
    turns = divided(replace(base, max_lag=0), shape, GPU, ranks=min(gpus, base.problems), nodes=gpus)
    turns = replace(turns, learner=replace(turns.learner, arrive_s=0.0))  # the weights are there already
    yield "synchronous", turns
    yield "colocated", replace(turns, learner=replace(turns.learner, switch_s=SWITCH_S))
    yield "split, lag 0", _best(scenario, max_lag=0)
    for lag in LAGS:
        yield f"lag {lag}", _best(scenario, max_lag=lag)
    yield "lag 2, no updates", replace(_best(scenario, max_lag=2), updates="wait-for-batch")


def _best(scenario: Scenario, *, max_lag: int) -> Settings:
    base = replace(scenario.base, max_lag=max_lag)
    return best(divisions(base, scenario.shape, GPU, gpus=scenario.gpus))


def _measure(name: str, settings: Settings, *, seeds: Sequence[int]) -> Row:
    outcomes, alone = [], []
    for seed in seeds:
        outcomes.append(simulate(replace(settings, seed=seed)))
        alone.append(_alone(replace(settings, seed=seed)))
    return Row(name=name, settings=settings, outcomes=outcomes, alone=alone)


def _alone(settings: Settings) -> float:
    """Tokens per second that the engines generate without a learner."""
    key = (settings.nodes, settings.engine, settings.lengths, settings.problems, settings.seed)
    if key not in _ALONE:
        bound = generation_bound(settings)
        _ALONE[key] = bound.generated_tokens / bound.seconds
    return _ALONE[key]


_ALONE: dict[object, float] = {}  # the same for all settings with these engines


def _table(scenario: Scenario, rows: Sequence[Row]) -> str:
    """The rows as text."""
    synchronous = rows[0].median("tokens_per_s")
    lines = [
        f"{scenario.name}: {scenario.problems} problems of {rows[0].settings.size} rollouts a step",
        f"{'':18}{'GPUs':>8}{'tokens/s':>10}{'':>16}{'x sync':>8}{'of bound':>10}{'step':>8}{'lag':>6}  "
        f"learner waits, engines' free slots",
    ]
    for row in rows:
        rates = sorted(one.tokens_per_s for one in row.outcomes)
        span = f"{rates[0]:,.0f}..{rates[-1]:,.0f}" if len(rates) > 1 else ""
        last = row.outcomes[0]
        gpus = f"{row.settings.learner.ranks}+{row.settings.nodes}" if row.name not in TURNS else f"{scenario.gpus}"
        lines.append(
            f"{row.name:18}{gpus:>8}{row.median('tokens_per_s'):10,.0f}{span:>16}"
            f"{row.median('tokens_per_s') / synchronous:8.2f}{row.of_bound:10.2f}{row.median('step_s'):7.1f}s"
            f"{row.median('mean_lag'):6.2f}  {_causes(last.learner, 'trains')}; {_causes(last.engines, 'busy')}"
        )
    return "\n".join([*lines, ""])


TURNS = ("synchronous", "colocated")


def _causes(shares: dict[str, float], work: str) -> str:
    """The causes of idle time above one percent, the largest first."""
    idle = sorted(((one, name) for name, one in shares.items() if name != work and one > 0.01), reverse=True)
    return ", ".join(f"{name} {one:.0%}" for one, name in idle) or "never"
