"""Settings of a simulation from a configuration, or from what a run has measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgpo_async.config import Run
from sgpo_async.errors import SgpoError
from sgpo_async.simulation.hardware import Hardware, Shape, engine_rates, learner_rates
from sgpo_async.simulation.predict import moments, predict
from sgpo_async.simulation.rates import EngineRates, LearnerRates, Lengths
from sgpo_async.simulation.workload import median_of, recorded_lengths
from sgpo_async.simulation.world import Settings

SIGMA = 1.2  # of lengths that nothing is known of but the mean
FEWEST = 5  # steps that a run must have measured
WAITS = 0.05  # a learner that waits for more of its time is limited by rollouts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run has measured, over the second half of its steps."""

    step_s: float
    tokens_per_s: float  # sampled tokens of the trained groups, from the mean length of the recorded ones
    mean_lag: float
    learner_idle: float
    engine_idle: float


def from_configuration(run: Run, shape: Shape, gpu: Hardware, *, mean: float, prompt: int) -> Settings:
    """The run of a configuration: a node for each of its servers. `mean`: of the lengths of completions."""
    longest = run.rollout.max_new_tokens
    lengths = Lengths(longest=longest, median=median_of(mean, SIGMA, longest), sigma=SIGMA, prompt=prompt)
    servers = run.engine.sglang.servers if run.engine.kind == "sglang" else 1
    tp = run.engine.sglang.tp if run.engine.kind == "sglang" else 1
    return replace(
        _of_run(run, lengths),
        nodes=run.local.actors * servers,
        engine=engine_rates(shape, gpu, slots=max(1, run.engine.slots // servers), tp=tp),
        learner=learner_rates(shape, gpu, ranks=run.local.ranks, recompute=run.learner.recompute > 0),
    )


def from_run(
    run: Run, metrics: Sequence[Mapping[str, Any]], samples: Sequence[dict[str, Any]]
) -> tuple[Settings, Measured]:
    """Settings that predict the steps that a run has measured, and what it measured.

    The learner's tokens take the time in which it did not wait. If it did wait, the time of a decoding step is the one
    that predicts the measured step; otherwise the one of the sequences that ran. How it depends on their number, a run
    does not tell: it is taken to be constant. Raises SgpoError if the run is too short.
    """
    half = [line for line in metrics if line["step"] > metrics[-1]["step"] // 2] if metrics else []
    if len(half) < FEWEST:
        raise SgpoError(
            f"{run.folder}: has {len(metrics)} steps, too few to advise from; let it train at least {2 * FEWEST}"
        )
    lengths = Lengths(longest=run.rollout.max_new_tokens, recorded=recorded_lengths(samples), prompt=1, strategy=0)
    first, last = half[0], half[-1]
    plain = replace(_of_run(run, lengths), nodes=int(last["actors"]))
    steps, wall = last["step"] - first["step"], last["wall_s"] - first["wall_s"]
    measured = Measured(
        step_s=wall / steps,
        tokens_per_s=plain.problems * plain.size * moments(plain).mean * steps / wall,
        mean_lag=statistics.fmean(line["lag_mean"] for line in half),
        learner_idle=statistics.fmean(line["learner_idle"] for line in half[1:]),
        engine_idle=float(last["engine_idle"] or 0.0),
    )
    train_s = (1 - measured.learner_idle) * measured.step_s
    trained = plain.problems * moments(plain).trained
    learner = LearnerRates(ranks=run.local.ranks, token_s=train_s * run.local.ranks / trained)
    generated = (last["tokens_generated"] - first["tokens_generated"]) / wall
    running = statistics.fmean(line.get("running") or run.engine.slots * plain.nodes for line in half)
    base_s = running / generated * (1 - measured.engine_idle)
    settings = replace(plain, learner=learner)
    if measured.learner_idle > WAITS:
        base_s = _fitted(settings, measured.step_s)
    return replace(settings, engine=replace(plain.engine, base_s=base_s)), measured


def _fitted(settings: Settings, step_s: float) -> float:
    """The time of a decoding step that predicts this time of a step; by bisection."""
    low, high = 1e-9, step_s
    for _ in range(60):
        middle = math.sqrt(low * high)
        predicted = predict(replace(settings, engine=replace(settings.engine, base_s=middle))).step_s
        low, high = (middle, high) if predicted < step_s else (low, middle)
    return low


def _of_run(run: Run, lengths: Lengths) -> Settings:
    """What a configuration says, with rates that must be replaced."""
    return Settings(
        nodes=run.local.actors,
        engine=EngineRates(slots=run.engine.slots, base_s=1.0, context_s=0.0),
        learner=LearnerRates(ranks=run.local.ranks, token_s=1.0),
        lengths=lengths,
        problems=run.learner.problems_per_step,
        autonomous=run.rollout.autonomous,
        guided=run.rollout.guided,
        max_lag=run.hub.max_lag,
        stale=run.hub.stale,
        batches_in_flight=run.hub.batches_in_flight,
        seed=run.seed,
    )
