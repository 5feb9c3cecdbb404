"""The Tuning section of README.md: the score of each learning rate, which shows how flat the optimum is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from sgpo_async.config.experiment import Experiment
from sgpo_async.experiments.plan import Result, tuned_cells, tuning_scores

Cell = tuple[str, str]


def tuning_tables(
    experiment: Experiment, results: Mapping[str, Result], rates: Mapping[Cell, float | None]
) -> list[str]:
    """The paragraphs and tables of the section, a table for each setting with tuning; empty if nothing is tuned.

    Args:
        rates: the chosen rates, from `best_rates`.
    """
    tried = tuned_cells(experiment)
    settings = dict.fromkeys(setting for setting, _ in tried)
    parts = ["## Tuning", _caption(experiment)] * bool(tried)
    for setting in settings:
        parts += [f"Tried in {setting}:"] * bool(setting)
        chosen = {cell: rates.get(cell) for cell in tried if cell[0] == setting}
        parts.append(_table(experiment, results, chosen))
    return parts


def _caption(experiment: Experiment) -> str:
    seeds = experiment.tune.seeds
    number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return (
        f"Validation pass rate alone over the last quarter of the curve, mean of {number} "
        f"({', '.join(map(str, seeds))}), in per cent; a run that diverged counts 0. In bold: "
        f"the rate that was chosen, the lower of equals.{_finalists(experiment)}"
    )


def _finalists(experiment: Experiment) -> str:
    tune = experiment.tune
    if not tune.finalists or len(tune.seeds) == 1:
        return ""
    return f" The {tune.finalists} best rates with seed {tune.seeds[0]} were tried with all seeds."


def _table(experiment: Experiment, results: Mapping[str, Result], chosen: Mapping[Cell, float | None]) -> str:
    rates = sorted(set(experiment.tune.rates))
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]
    for cell, best in chosen.items():
        scores = tuning_scores(experiment, cell, results)
        shown = [_score(scores[rate], len(experiment.tune.seeds), chosen=rate == best) for rate in rates]
        lines.append(f"| {cell[1]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _score(found: Sequence[float], seeds: int, *, chosen: bool) -> str:
    """The mean in per cent, with the number of seeds while some are missing."""
    if not found:
        return "–"
    mean = f"{100 * fmean(found):.1f}"
    return f"**{mean}**" if chosen else mean if len(found) == seeds else f"{mean} ({len(found)} of {seeds})"
