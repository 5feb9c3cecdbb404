"""What stands above a table, each clause of it taken from the experiment."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sgpo_async.config.experiment import Experiment
from sgpo_async.config.schema import Run
from sgpo_async.experiments.figures import MOST_BANDS
from sgpo_async.experiments.plan import budget, cell_run, cells, tuned

FIGURES = (
    "Alone: without a strategy; guided: with one. "
    "Mean ± half of the 95 % interval (Student's t) over n seeds, in per cent."
)

EDGE = "(edge)"  # behind a learning rate that the grid did not enclose


def conditions(experiment: Experiment, setting: str) -> str:
    """The budget of each trial in this setting, and on what it is measured."""
    runs = {method: cell_run(experiment, (setting, method)) for method in experiment.methods}
    taught = [method for method, run in runs.items() if run.algorithm.objective == "sft"]
    parts = [_budget(run) for method, run in runs.items() if method not in taught]
    parts += [f"none for {', '.join(taught)}: demonstrations alone"] * bool(taught)
    return f"Rollouts for each trial: {_each(parts)}. Pass rates: {_each(_measured(run) for run in runs.values())}."


def _budget(run: Run) -> str:
    return f"{budget(run):,} ({run.steps} steps of {run.learner.problems_per_step} problems)"


def _measured(run: Run) -> str:
    how, count = run.evaluation, run.tasks.held_out
    samples = "one sample" if how.samples == 1 else f"{how.samples} samples"
    nucleus = f" and top-p {how.top_p:g}" if how.top_p < 1 else ""
    return (
        f"of {count} test problems at the end, of {count} others for validation along the way, {samples} of each at "
        f"T = {how.temperature:g}{nucleus}"
    )


def learning_rates(experiment: Experiment) -> str:
    """How they were found."""
    found = [cell for cell in cells(experiment) if tuned(experiment, cell)]
    if not found:
        return "Learning rates were given; none was tuned."
    where = f", in {experiment.tune.setting} for all settings" if experiment.tune.setting else ""
    given = [_name(experiment, cell) for cell in cells(experiment) if cell not in found]
    return (
        f"Learning rates were chosen by the validation problems{where}, in trials with other seeds "
        f"({', '.join(map(str, experiment.tune.seeds))}){'; given: ' * bool(given)}{_each(given)}."
    )


def curves_say(experiment: Experiment, kinds: Collection[str]) -> list[str]:
    """What figures of these kinds show; nothing if there are none."""
    thinned = any(cell_run(experiment, cell).learner.skip_uniform for cell in cells(experiment))
    says = [
        f"In the figures bands are the same intervals; a figure of more than {MOST_BANDS} methods has none.",
        "Alpha is the weight of the distillation, in the mean over the batch; methods in which it is 0 throughout are "
        "not in its figure." * ("alpha" in kinds),
        "Each point of a measure other than the pass rate is the mean over the steps since the point before."
        * bool(set(kinds) - {"curves"}),
        "Entropy leaves out rollouts whose advantage is 0 (`learner.skip_uniform`)." * (thinned and "entropy" in kinds),
        "A run that diverged goes on with a pass rate of 0, and has no other measures from there.",
    ]
    return [" ".join(sentence for sentence in says if sentence)] * bool(kinds)


def _name(experiment: Experiment, cell: tuple[str, str]) -> str:
    """A method; with the setting if its learning rate is found in another."""
    setting, method = cell
    everywhere = not any(tuned(experiment, (other, method)) for other in experiment.settings)
    return method if everywhere else f"{method} in {setting}"


def _each(phrases: Iterable[str]) -> str:
    """Every phrase once: more than one where methods differ."""
    return "; ".join(dict.fromkeys(phrases))
