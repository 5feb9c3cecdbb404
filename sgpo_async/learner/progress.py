"""The progress of a run across interruptions, and its contribution to the metrics and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sgpo_async.wire.records import Evaluated


@dataclass
class Progress:
    """Counts since the first step of the run; stored in every checkpoint."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # trained tokens
    sampled: int = 0  # ... of which sampled by an engine: only these have a lag
    lagging: float = 0.0  # sum of the lag over the sampled tokens
    lag_max: int = 0
    wall_s: float = 0.0  # time in the training loop
    idle_s: float = 0.0  # ... of which waiting for batches
    pass_auto_first: float | None = None  # of the first evaluation
    pass_auto_last: float | None = None
    pass_guided_first: float | None = None
    pass_guided_last: float | None = None
    lora: dict[str, Any] | None = None  # `learner.lora` of the run; None in checkpoints of older releases
    version: int | None = None  # of the weights in the checkpoint; None in checkpoints of older releases

    def plain(self) -> dict[str, Any]:
        """Convert to plain data for a checkpoint; `Progress(**plain)` is the inverse."""
        return asdict(self)

    def trained(self, metrics: Mapping[str, Any], *, idle_s: float, wall_s: float) -> None:
        """Add one step."""
        self.step += 1
        self.tokens += metrics["tokens"]
        self.sampled += sum(metrics["lag_histogram"].values())
        self.lagging += sum(int(lag) * count for lag, count in metrics["lag_histogram"].items())
        self.lag_max = max(self.lag_max, metrics["lag_max"] or 0)
        self.idle_s += idle_s
        self.wall_s += wall_s

    def evaluated(self, results: Sequence[Evaluated]) -> dict[str, Any]:
        """Add evaluation results; return the metrics of the newest one."""
        for result in results:
            if self.pass_auto_first is None:
                self.pass_auto_first, self.pass_guided_first = result.pass_auto, result.pass_guided
            self.pass_auto_last, self.pass_guided_last = result.pass_auto, result.pass_guided
        if not results:
            return {}
        newest = results[-1]
        return {
            "eval_pass_auto": newest.pass_auto,
            "eval_pass_guided": newest.pass_guided,
            "eval_version": newest.version,
            "eval_served": [newest.served_oldest, newest.served_newest],
            "eval_lag": newest.lag,
            "eval_benchmarks": {score.name: score.metrics() for score in newest.benchmarks},
        }

    def summary(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """Return the learner's and the hub's part of summary.json."""
        return {
            "steps": self.step,
            "wall_s": self.wall_s,
            "pass_auto_first": self.pass_auto_first,
            "pass_auto_last": self.pass_auto_last,
            "pass_guided_first": self.pass_guided_first,
            "pass_guided_last": self.pass_guided_last,
            "lag_mean": self.lagging / max(self.sampled, 1),
            "lag_max": self.lag_max,
            "tokens_trained": self.tokens,
            "learner_idle": self.idle_s / self.wall_s if self.wall_s else 0.0,
            "weight_version": status["version"],
            "actors": len(status["actors"]),
            "tokens_generated": status["tokens_generated"],
            "engine_idle": status["engine_idle"],
            "ledger": status["ledger"],
            "evaluations": status["evaluations"],
            "leases_reissued": status["leases_reissued"],
            "rejected": status["rejected"],
            "duplicates": status["duplicates"],
        }


def hub_metrics(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hub's part of one line of metrics, from its status after a commit."""
    rates = ("pass_auto", "pass_guided", "reward_auto", "reward_guided", "uniform", "cut")
    biases = ("tokens_dropped", "length_bias", "pass_bias")
    canary = ("canary_mean", "canary_max", "canary_alarms")
    engines = ("tokens_per_s", "tokens_generated", "running", "engine_idle", "engine_waits")
    keys = ("version", *rates, *biases, *canary, *engines, "ledger")
    return {key: status[key] for key in keys} | {"actors": len(status["actors"])}
