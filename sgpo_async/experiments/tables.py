"""README.md of an experiment: a table for each setting (pass rates with intervals) and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sgpo_async.config.experiment import Experiment, Figure
from sgpo_async.errors import SgpoError
from sgpo_async.experiments.captions import EDGE, TABLE_NOTE, conditions, figure_notes, learning_rates
from sgpo_async.experiments.code_version import codes
from sgpo_async.experiments.curves import best, completed, late, third
from sgpo_async.experiments.drawings import draw_setting, kind_of, remove_others
from sgpo_async.experiments.plan import Result, at_the_edge, best_rates, cells, final
from sgpo_async.experiments.statistics import Interval, interval
from sgpo_async.experiments.tuning_table import tuning_tables
from sgpo_async.files import write_whole

Measure = Callable[[Result], float | None]
PATTERN = "patterns/"  # begins the keys of the curves that hold the shares of learner.patterns
QUOTES = {"quotes/own": "quoting the context, %", "quotes/other": "quoting another's, %"}  # learner.quoted_words


class Row(NamedTuple):
    """The data of one method in a table."""

    method: str
    rate: str  # the learning rate; empty until it is known
    results: list[Result]


def check_packages() -> None:
    """Raise SgpoError, one line, if a package is missing that `write_tables` needs."""
    for name in ("matplotlib", "scipy"):
        if find_spec(name) is None:
            raise SgpoError(
                f"experiment: tables and figures need {name}, which is not installed; run: "
                "pip install 'sgpo-async[experiments]'"
            )


def write_tables(experiment: Experiment, results: Mapping[str, Result], *, folder: Path) -> None:
    """Write README.md and its figures into `folder`, from the finished trials."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = best_rates(experiment, results)
    tables = _rows(experiment, results, rates)
    shown = [result for rows in tables.values() for row in rows for result in row.results]
    captions = {setting: conditions(experiment, setting) for setting in experiment.settings}
    distinct = {*captions.values()}
    common = len(distinct) == 1
    parts = [f"# {experiment.title or experiment.name}", *(distinct if common else ())]
    parts.append(f"{TABLE_NOTE} {learning_rates(experiment)}")
    drawn: dict[str, dict[str, Figure]] = {}
    for setting, rows in tables.items():
        drawn[setting] = draw_setting(setting, {row.method: row.results for row in rows}, folder, experiment.figures)
    kinds = {figure.kind for figures in drawn.values() for figure in figures.values()}
    parts += figure_notes(kinds, len(experiment.seeds))
    if len(experiment.settings) > 1:
        parts += ["Alone, at the end (test problems):", _overview(tables)]
    for setting, rows in tables.items():
        parts += [f"## {setting}"] * bool(setting) + [captions[setting]] * (not common) + [_table(rows)]
        parts += _compared(rows, experiment.reference) if experiment.reference else []
        parts += _completions(rows)
        parts += [f"![{kind_of(figure).title}]({file})" for file, figure in drawn[setting].items()]
    parts += tuning_tables(experiment, results, rates)
    parts += [f"Code: {codes(shown)}."] * bool(shown)
    write_whole(folder / "README.md", "\n\n".join(parts) + "\n")
    remove_others({file for figures in drawn.values() for file in figures}, folder)


def _rows(
    experiment: Experiment, results: Mapping[str, Result], rates: Mapping[tuple[str, str], float | None]
) -> dict[str, list[Row]]:
    """Setting -> a row for each method, in the order of the file."""
    rows = {cell: Row(cell[1], "", []) for cell in cells(experiment)}
    for trial in final(experiment, rates):
        cell = trial.setting, trial.method
        mark = f" {EDGE}" if at_the_edge(experiment, rates[cell]) else ""
        rows[cell] = rows[cell]._replace(rate=f"{trial.rate:g}{mark}")
        if trial.id in results:
            rows[cell].results.append(completed(results[trial.id], trial.run))
    return {setting: [rows[setting, method] for method in experiment.methods] for setting in experiment.settings}


def _overview(tables: Mapping[str, Sequence[Row]]) -> str:
    """The final pass rates: a row per method, a column per setting."""
    lines = [f"| method | {' | '.join(tables)} |", f"|---|{'---|' * len(tables)}"]
    for rows in zip(*tables.values(), strict=True):
        shown = [_cell([_at_the_end(result) for result in row.results]) for row in rows]
        lines.append(f"| {rows[0].method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    columns: dict[str, Measure] = {
        "alone, at the end (test)": _at_the_end,
        "alone, a third of the way (validation)": third,
        "alone, best (validation)": best,
        "guided, at the end (test)": lambda result: result["test"]["guided"],
    }
    lines = [
        f"| method | lr | n | {' | '.join(columns)} | diverged |",
        f"|---|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for method, rate, results in rows:
        shown = [_cell([measure(result) for result in results]) for measure in columns.values()]
        diverged = sum(result["diverged"] is not None for result in results)
        lines.append(f"| {method} | {rate} | {len(results)} | {' | '.join(shown)} | {diverged or ''} |")
    if any(EDGE in row.rate for row in rows):
        lines += ["", f"{EDGE}: the lowest or highest of the rates that were tried; a better one may lie beyond."]
    return "\n".join(lines)


def _compared(rows: Sequence[Row], reference: str) -> list[str]:
    """Differences from the reference in points, paired by seed: runs with the same seed see the same problems."""
    by_method = {row.method: {result["config"]["seed"]: result for result in row.results} for row in rows}
    of_reference = by_method.pop(reference, {})
    lines = []
    for method, results in by_method.items():
        seeds = results.keys() & of_reference.keys()
        differences = (
            [measure(results[seed]) - measure(of_reference[seed]) for seed in sorted(seeds)]
            for measure in (_at_the_end, third)
        )
        if seeds:
            cells = " | ".join(show(interval(values), sign="+") for values in differences)
            lines.append(f"| {method} | {len(seeds)} | {cells} |")
    if not lines:
        return []
    head = ["| method | n | at the end (test) | a third of the way (validation) |", "|---|---|---|---|"]
    return [f"Against {reference}, seed by seed, in points:", "\n".join(head + lines)]


def _completions(rows: Sequence[Row]) -> list[str]:
    """What the autonomous completions of the last quarter of training look like, where the trials have measured it."""
    points = [point for row in rows for result in row.results for point in result["curve"]]
    if not any("length_auto" in point for point in points):
        return []
    measured = dict.fromkeys(key for point in points for key in point)
    names = {key: f"with {key.removeprefix(PATTERN)}, %" for key in measured if key.startswith(PATTERN)}
    names |= {key: name for key, name in QUOTES.items() if key in measured}
    head = ["method", "tokens", *names.values(), "entropy, nats per token"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        keys = ("length_auto", *names, "entropy")
        values = {key: [late(result, key) for result in row.results] for key in keys}
        cells = [
            _cell(values["length_auto"], factor=1),
            *(_cell(values[key]) for key in names),
            _cell(values["entropy"], factor=1, form=".3f"),
        ]
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    return [
        "Autonomous completions in the last quarter of training, without steps after a divergence:",
        "\n".join(lines),
    ]


def _at_the_end(result: Result) -> float:
    return float(result["test"]["auto"])


def _cell(values: Sequence[float | None], *, factor: float = 100, form: str = ".1f") -> str:
    known = [value for value in values if value is not None]
    return show(interval(known), factor=factor, form=form) if known else "–"


def show(found: Interval, *, sign: str = "", factor: float = 100, form: str = ".1f") -> str:
    """The mean and half of its interval, in per cent unless `factor` is 1; `sign` "+" for differences."""
    half = "" if found.half is None else f" ± {factor * found.half:{form}}"
    return f"{factor * found.mean:{sign}{form}}{half}"
