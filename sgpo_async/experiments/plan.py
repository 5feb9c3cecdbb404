"""The trials of an experiment, as pure functions: no process, no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from sgpo_async.config.experiment import BASE, Base, Experiment
from sgpo_async.config.schema import Run, require
from sgpo_async.experiments.identity import Plain, configuration, identity

Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of one method in one setting."""

    setting: str
    method: str
    rate: float
    seed: int
    overrides: tuple[str, ...]  # of the experiment's configuration, including learning rate and seed
    run: Run  # the resulting configuration
    config: Plain  # the same as plain data, from which the identity is computed

    @cached_property
    def id(self) -> str:
        """The identity, which names the result file. It is independent of experiment, setting and method names."""
        return identity(self.config)


def cells(experiment: Experiment) -> list[tuple[str, str]]:
    """(setting, method) of every cell of the table."""
    return [(setting, method) for setting in experiment.settings for method in experiment.methods]


def trial(experiment: Experiment, cell: tuple[str, str], *, rate: float | None, seed: int) -> Trial:
    """The trial of a cell; `rate` None: the learning rate of the cell's configuration."""
    setting, method = cell
    changes = {"seed": seed} if rate is None else {"seed": seed, "optim.lr": rate}
    run = replace(cell_run(experiment, cell), seed=seed)  # much faster than parsing all overrides for each trial
    run = run if rate is None else replace(run, optim=replace(run.optim, lr=rate))
    return Trial(
        setting=setting,
        method=method,
        rate=run.optim.lr,
        seed=seed,
        overrides=experiment.overrides(experiment.keys(setting, method), changes),
        run=run,
        config=configuration(experiment, run),
    )


def tuned(experiment: Experiment, cell: tuple[str, str]) -> bool:
    """Whether the learning rate of a cell is tuned."""
    return bool(experiment.tune.rates) and "optim.lr" not in experiment.keys(*cell)


def tuned_cells(experiment: Experiment) -> list[tuple[str, str]]:
    """The cells in which learning rates are tried."""
    tried = dict.fromkeys(tuning_cell(experiment, cell) for cell in cells(experiment))
    return [cell for cell in tried if tuned(experiment, cell)]


def tuning(experiment: Experiment, results: Mapping[str, Result]) -> list[Trial]:
    """The tuning trials: one per tuned cell, rate and tuning seed.

    With `tune.finalists`, those of the other seeds than the first are known of a cell when the first seed's are in
    `results`.
    """
    tried = (_tried(experiment, cell, results) for cell in tuned_cells(experiment))
    return [trial for rates in tried for trials in rates.values() for trial in trials]


def count_tuning(experiment: Experiment) -> int:
    """The number of tuning trials in the end."""
    tune = experiment.tune
    rates = len(set(tune.rates))
    finalists = min(tune.finalists or rates, rates)
    return len(tuned_cells(experiment)) * (rates + finalists * (len(tune.seeds) - 1))


def best_rates(experiment: Experiment, results: Mapping[str, Result]) -> dict[tuple[str, str], float | None]:
    """Each cell's learning rate with the highest validation pass rate, the lower one if two are equal.

    None: the cell is not tuned. Cells whose tuning is not complete are left out.
    """
    chosen: dict[tuple[str, str], float | None] = {}
    for cell in cells(experiment):
        if not tuned(experiment, cell):
            chosen[cell] = None
            continue
        tried = _tried(experiment, tuning_cell(experiment, cell), results)
        if all(trial.id in results for trials in tried.values() for trial in trials):
            scores = _scores(tried, results)
            with_all_seeds = (rate for rate in sorted(scores) if len(scores[rate]) == len(experiment.tune.seeds))
            chosen[cell] = max(with_all_seeds, key=lambda rate: fmean(scores[rate]))
    return chosen


def tuning_scores(
    experiment: Experiment, cell: tuple[str, str], results: Mapping[str, Result]
) -> dict[float, list[float]]:
    """Rate -> validation pass rates of the finished tuning trials that decide the rate of `cell`."""
    return _scores(_tried(experiment, tuning_cell(experiment, cell), results), results)


def _scores(tried: Mapping[float, Sequence[Trial]], results: Mapping[str, Result]) -> dict[float, list[float]]:
    return {rate: [validation(results[t.id]) for t in trials if t.id in results] for rate, trials in tried.items()}


def at_the_edge(experiment: Experiment, rate: float | None) -> bool:
    """Whether a chosen rate is the lowest or highest of the grid: a better rate may lie outside."""
    rates = set(experiment.tune.rates)
    return len(rates) > 1 and rate in (min(rates), max(rates))


def tuning_cell(experiment: Experiment, cell: tuple[str, str]) -> tuple[str, str]:
    """The cell whose trials decide the learning rate of `cell`."""
    return experiment.tune.setting or cell[0], cell[1]


def _tried(experiment: Experiment, cell: tuple[str, str], results: Mapping[str, Result]) -> dict[float, list[Trial]]:
    """Rate -> its tuning trials, as far as they are known; the first seed's come first."""
    first, *others = experiment.tune.seeds
    begun = {rate: trial(experiment, cell, rate=rate, seed=first) for rate in experiment.tune.rates}
    finalists = _finalists(experiment, begun, results)
    return {
        rate: [one, *(trial(experiment, cell, rate=rate, seed=seed) for seed in others if rate in finalists)]
        for rate, one in begun.items()
    }


def _finalists(experiment: Experiment, begun: Mapping[float, Trial], results: Mapping[str, Result]) -> list[float]:
    """The rates that are tried with more than the first seed; none before all of the first seed's are finished.

    Args:
        begun: rate -> its trial with the first seed.
    """
    if not experiment.tune.finalists:
        return list(begun)
    if not all(one.id in results for one in begun.values()):
        return []
    ranked = sorted(begun, key=lambda rate: (-validation(results[begun[rate].id]), rate))
    return ranked[: experiment.tune.finalists]


def final(experiment: Experiment, rates: Mapping[tuple[str, str], float | None]) -> list[Trial]:
    """One trial per seed and cell with a known rate, in the order of seeds, so that a table fills evenly."""
    return [trial(experiment, cell, rate=rates[cell], seed=seed) for seed in experiment.seeds for cell in rates]


def validation(result: Result) -> float:
    """Mean autonomous pass rate on validation problems over the last quarter of the curve; 0 if the run diverged.

    An average, so that neither an early peak nor the last point alone decides.
    """
    if result["diverged"] is not None:
        return 0.0
    return fmean(point["auto"] for point in last_quarter(result["curve"]))


def last_quarter(curve: Sequence[Plain]) -> Sequence[Plain]:
    """The points of the last quarter of a curve, at least one."""
    return curve[-max(1, len(curve) // 4) :]


def check_budget(experiment: Experiment) -> dict[str, int]:
    """Setting -> rollouts of each of its trials; raises ConfigError if the methods in a setting differ.

    Settings may differ, because methods are compared within a setting. Objectives that learn only from demonstrations
    use no rollouts and are left out.
    """
    return {setting: _budget_in(experiment, setting) for setting in experiment.settings}


def _budget_in(experiment: Experiment, setting: str) -> int:
    runs = {method: cell_run(experiment, (setting, method)) for method in experiment.methods}
    budgets = {method: budget(run) for method, run in runs.items() if run.algorithm.objective != "sft"}
    first = next(iter(budgets.values()), 0)
    where = f" in {setting}" if setting else ""
    for method, rollouts in budgets.items():
        rule = f"must have the sample budget of the other methods{where}, {first} rollouts"
        require(rollouts == first, f"methods.{method}", rule, rollouts)
    return first


def cell_run(experiment: Experiment, cell: tuple[str, str]) -> Run:
    """The configuration of a cell, without a tuned learning rate and a seed."""
    return experiment.run(experiment.overrides(experiment.keys(*cell)))


def budget(run: Run) -> int:
    """Rollouts of one run."""
    return run.steps * run.rollouts_per_step


def base_levels(experiment: Experiment) -> list[list[str]]:
    """Names of the bases by level: each base starts from a base of an earlier level, or from none."""
    levels: list[list[str]] = []
    left, made = dict(experiment.bases), set[str]()
    while left:
        level = [name for name, base in left.items() if _start(base) not in experiment.bases or _start(base) in made]
        require(bool(level), "bases", "must not start from each other in a circle", ", ".join(left))
        levels.append(level)
        made |= set(level)
        left = {name: base for name, base in left.items() if name not in made}
    return levels


def _start(base: Base) -> str:
    return base.start.removeprefix(BASE) if base.start.startswith(BASE) else ""
