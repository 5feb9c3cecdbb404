"""Which side limits a run, what one change brings, and the best division of a number of GPUs.

Every answer comes from the closed form (`predict`), which takes no time, and is checked by a simulated run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sgpo_async.simulation.hardware import Hardware, Shape, engine_rates, learner_rates
from sgpo_async.simulation.predict import Prediction, predict
from sgpo_async.simulation.world import Outcome, Settings, simulate

WHY = {
    "learner": "the learner trains all the time; engines wait because no more groups may be begun",
    "generation": "all slots are busy, and the learner waits for rollouts",
    "staleness": "hub.max_lag lets too few groups run: slots are free, and the learner waits for the longest rollouts",
    "turns": "hub.max_lag=0: one side always waits for the other",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change to a run, what the closed form predicts for it, and what a simulated run gives."""

    name: str
    settings: Settings
    predicted: Prediction
    simulated: Outcome | None  # None: not simulated

    @property
    def error(self) -> float | None:
        """Of the prediction, relative to the simulated run."""
        return self.predicted.tokens_per_s / self.simulated.tokens_per_s - 1 if self.simulated else None


def divisions(base: Settings, shape: Shape, gpu: Hardware, *, gpus: int, tp: int = 1) -> Iterable[Settings]:
    """The run on every division of these GPUs into learner ranks and servers of `tp` GPUs."""
    for ranks in range(1, gpus - tp + 1):
        if (gpus - ranks) % tp == 0 and ranks <= base.problems:
            yield divided(base, shape, gpu, ranks=ranks, nodes=(gpus - ranks) // tp, tp=tp)


def divided(base: Settings, shape: Shape, gpu: Hardware, *, ranks: int, nodes: int, tp: int = 1) -> Settings:
    """The run with this many learner ranks and servers."""
    learner = replace(
        learner_rates(shape, gpu, ranks=ranks),
        checkpoint_s=base.learner.checkpoint_s,
        checkpoint_every=base.learner.checkpoint_every,
    )
    return replace(base, nodes=nodes, engine=engine_rates(shape, gpu, slots=base.engine.slots, tp=tp), learner=learner)


def best(candidates: Iterable[Settings]) -> Settings:
    """The one with the highest predicted throughput; of equal ones, the first."""
    return max(candidates, key=lambda one: predict(one).tokens_per_s)


def changes(settings: Settings, *, lags: Sequence[int] = (0, 1, 2, 4, 8)) -> dict[str, Settings]:
    """What could be changed at this run, by what a user would do."""
    found = {
        "one more inference node": replace(settings, nodes=settings.nodes + 1),
        "half as many slots again": replace(
            settings, engine=replace(settings.engine, slots=settings.engine.slots * 3 // 2)
        ),
    }
    if settings.nodes > 1:
        found["one inference node less"] = replace(settings, nodes=settings.nodes - 1)
    for lag in lags:
        if lag != settings.max_lag:
            found[f"hub.max_lag={lag}"] = replace(settings, max_lag=lag)
    return found


def examine(name: str, settings: Settings, *, simulated: bool = True) -> Change:
    """Predict, and simulate."""
    outcome = simulate(settings) if simulated else None
    return Change(name=name, settings=settings, predicted=predict(settings), simulated=outcome)
