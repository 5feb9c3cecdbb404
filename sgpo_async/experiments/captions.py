"""The text above a table, composed from the experiment file."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sgpo_async.config.experiment import Experiment
from sgpo_async.config.schema import Run
from sgpo_async.experiments.figures import MOST_BANDS, SEEDS_FOR_BANDS
from sgpo_async.experiments.plan import budget, cell_run, cells, tuned

TABLE_NOTE = (
    "Alone: without a strategy; guided: with one. "
    "Mean ± half of the 95 % interval (Student's t) over n seeds, in per cent."
)

EDGE = "(edge)"  # marks a chosen learning rate that is the lowest or highest of the grid


def conditions(experiment: Experiment, setting: str) -> str:
    """The sample budget of each trial in this setting, and how its pass rates are measured."""
    runs = {method: cell_run(experiment, (setting, method)) for method in experiment.methods}
    supervised = [method for method, run in runs.items() if run.algorithm.objective == "sft"]
    parts = [_budget(run) for method, run in runs.items() if method not in supervised]
    if supervised:
        parts.append(f"none for {', '.join(supervised)}: demonstrations alone")
    measured = _distinct(_measured(run) for run in runs.values())
    return f"Rollouts for each trial: {_distinct(parts)}. Pass rates: {measured}."


def _budget(run: Run) -> str:
    return f"{budget(run):,} ({run.steps} steps of {run.learner.problems_per_step} problems)"


def _measured(run: Run) -> str:
    evaluation, count = run.evaluation, run.tasks.held_out
    samples = "one sample" if evaluation.samples == 1 else f"{evaluation.samples} samples"
    nucleus = f" and top-p {evaluation.top_p:g}" if evaluation.top_p < 1 else ""
    return (
        f"of {count} test problems at the end, of {count} others for validation along the way, {samples} of each at "
        f"T = {evaluation.temperature:g}{nucleus}"
    )


def learning_rates(experiment: Experiment) -> str:
    """How the learning rates were chosen."""
    tuned_cells = [cell for cell in cells(experiment) if tuned(experiment, cell)]
    if not tuned_cells:
        return "Learning rates were given; none was tuned."
    where = f", in {experiment.tune.setting} for all settings" if experiment.tune.setting else ""
    given = [_name(experiment, cell) for cell in cells(experiment) if cell not in tuned_cells]
    return (
        f"Learning rates were chosen by the validation problems{where}, in trials with other seeds "
        f"({', '.join(map(str, experiment.tune.seeds))}){'; given: ' * bool(given)}{_distinct(given)}."
    )


def figure_notes(kinds: Collection[str], seeds: int) -> list[str]:
    """The paragraph that explains figures of these kinds, over so many seeds; empty without figures."""
    sentences = [
        f"In the figures bands are the same intervals; a figure of more than {MOST_BANDS} methods has none."
        if seeds >= SEEDS_FOR_BANDS
        else f"The figures show means, without intervals: those of fewer than {SEEDS_FOR_BANDS} seeds would fill them.",
        "Alpha is the weight of the distillation, in the mean over the batch; methods in which it is 0 throughout are "
        "not in its figure." * ("alpha" in kinds),
        "Each point of a measure other than the pass rate is the mean over the steps since the point before."
        * bool(set(kinds) - {"curves"}),
        "A run that diverged goes on with a pass rate of 0, and has no other measures from there.",
    ]
    return [" ".join(sentence for sentence in sentences if sentence)] * bool(kinds)


def _name(experiment: Experiment, cell: tuple[str, str]) -> str:
    """The method; with the setting if another setting tunes the method's learning rate."""
    setting, method = cell
    everywhere = not any(tuned(experiment, (other, method)) for other in experiment.settings)
    return method if everywhere else f"{method} in {setting}"


def _distinct(phrases: Iterable[str]) -> str:
    """The distinct phrases, in order."""
    return "; ".join(dict.fromkeys(phrases))
