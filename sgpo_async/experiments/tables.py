"""README.md of an experiment: final pass rates with intervals, the start of the curves, guided skill; and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sgpo_async.config.experiment import Experiment
from sgpo_async.experiments.captions import FIGURES, conditions, learning_rates
from sgpo_async.experiments.code_version import codes
from sgpo_async.experiments.curves import best, completed, over_seeds, third
from sgpo_async.experiments.figures import Curve, draw_curves
from sgpo_async.experiments.plan import Result, best_rates, cells, final, slug
from sgpo_async.experiments.statistics import Interval, interval
from sgpo_async.metrics.files import write_whole

Figure = Callable[[Result], float | None]


def write_tables(experiment: Experiment, results: Mapping[str, Result], *, folder: Path) -> None:
    """Write README.md and curves-*.svg into `folder`, of the trials that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = best_rates(experiment, results)
    by_cell: dict[tuple[str, str], list[Result]] = {cell: [] for cell in cells(experiment)}
    for trial in final(experiment, rates):
        if trial.id in results:
            found = completed(results[trial.id], experiment.run(trial.words))
            by_cell[trial.setting, trial.method].append(found)
    said = {setting: conditions(experiment, setting) for setting in experiment.settings}
    common = len(set(said.values())) == 1
    parts = [f"# {experiment.title or experiment.name}", *[*said.values()][:common]]
    parts.append(f"{FIGURES} {learning_rates(experiment)}")
    if len(experiment.settings) > 1:
        parts += ["Alone, at the end (test problems):", _overview(experiment, by_cell)]
    for setting in experiment.settings:
        rows = [(method, by_cell[setting, method]) for method in experiment.methods]
        parts += [f"## {setting}"] * bool(setting) + [said[setting]] * (not common) + [_table(rows)]
        name = f"curves-{slug(setting)}.svg" if setting else "curves.svg"
        if any(found for _, found in rows):
            draw_curves([Curve(method, over_seeds(found, "auto")) for method, found in rows if found], folder / name)
            parts.append(f"![pass rate over rollouts]({name})")
    shown = [result for found in by_cell.values() for result in found]
    parts += [f"Code: {codes(shown)}."] * bool(shown)
    write_whole(folder / "README.md", "\n\n".join(parts) + "\n")


def _overview(experiment: Experiment, by_cell: Mapping[tuple[str, str], Sequence[Result]]) -> str:
    """Methods against settings."""
    lines = [f"| method | {' | '.join(experiment.settings)} |", f"|---|{'---|' * len(experiment.settings)}"]
    for method in experiment.methods:
        cells_of = [_cell([_at_the_end(r) for r in by_cell[setting, method]]) for setting in experiment.settings]
        lines.append(f"| {method} | {' | '.join(cells_of)} |")
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    columns: dict[str, Figure] = {
        "alone, at the end (test)": _at_the_end,
        "alone, a third of the way (validation)": third,
        "alone, best (validation)": best,
        "guided, at the end (test)": lambda result: result["test"]["guided"],
    }
    lines = [
        f"| method | lr | n | {' | '.join(columns)} | diverged |",
        f"|---|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for method, results in rows:
        figures = [_cell([figure(result) for result in results]) for figure in columns.values()]
        lr = ", ".join(sorted({f"{result['rate']:g}" for result in results}))
        diverged = sum(result["diverged"] is not None for result in results)
        lines.append(f"| {method} | {lr} | {len(results)} | {' | '.join(figures)} | {diverged or ''} |")
    return "\n".join(lines)


def _at_the_end(result: Result) -> float:
    return float(result["test"]["auto"])


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return show(interval(known)) if known else "–"


def show(found: Interval) -> str:
    """In per cent."""
    return f"{100 * found.mean:.1f}" + (f" ± {100 * found.half:.1f}" if found.half is not None else "")
