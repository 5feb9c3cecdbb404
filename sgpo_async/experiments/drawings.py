"""The figures of a setting: pass rates, alone or beside mean alpha or the masked share of the KL; and entropy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sgpo_async.config.experiment import FIGURE_KINDS, METRIC, Figure
from sgpo_async.experiments.curves import has, over_seeds
from sgpo_async.experiments.figures import Curve, Panel, draw, parts
from sgpo_async.experiments.plan import Result


class Measure(NamedTuple):
    """A value that the points of a curve have."""

    key: str
    label: str
    factor: float = 1.0
    top: float | None = None


class Kind(NamedTuple):
    """A kind of figure."""

    title: str
    measures: tuple[Measure, ...]
    above_0: str = ""  # metric key; the figure shows only methods with a value above 0 of this metric


PASS_RATE = Measure("auto", "validation pass rate alone, %", 100, 100)
GUIDED = Measure("guided", "validation pass rate guided, %", 100, 100)
KINDS = {  # the keys are FIGURE_KINDS
    "curves": Kind("pass rate over rollouts", (PASS_RATE,)),
    "alpha": Kind("pass rate and mean alpha over rollouts", (PASS_RATE, Measure("alpha", "mean alpha")), "alpha"),
    "masked": Kind(
        "pass rate, and the share of the KL that the mask takes or would take, over rollouts",
        (PASS_RATE, Measure("kl_masked_mass", "share of the KL where d > delta, %", 100, 100)),
        "kl_masked_mass",
    ),
    "entropy": Kind("entropy over rollouts", (Measure("entropy", "entropy, nats per token"),)),
}


def kind_of(figure: Figure) -> Kind:
    """What this figure shows."""
    if figure.kind != METRIC:
        return KINDS[figure.kind]
    measure = GUIDED if figure.metric == GUIDED.key else Measure(figure.metric, figure.metric)
    return Kind(f"pass rate and {figure.metric} over rollouts", (PASS_RATE, measure))


def draw_setting(
    setting: str,
    methods: Mapping[str, Sequence[Result]],
    folder: Path,
    chosen: Sequence[Figure] | None = None,
) -> dict[str, Figure]:
    """Write the figures of a setting that have at least one curve; returns file -> figure.

    Args:
        chosen: the figures that the experiment file names, for all settings; None: every kind.
    """
    written: dict[str, Figure] = {}
    for figure in _figures(setting, [*methods], chosen):
        kind = kind_of(figure)
        shown = {place: name for place, name in enumerate(figure.methods) if _shows(kind, methods[name])}
        if shown:
            file = f"{figure.stem}.svg"
            draw([_panel(measure, shown, methods) for measure in kind.measures], folder / file)
            written[file] = figure
    return written


def _figures(setting: str, methods: list[str], chosen: Sequence[Figure] | None) -> list[Figure]:
    """The figures chosen for this setting; without a choice every kind for all methods, split if they are too many.

    The colour of a method depends on its place among the methods of the figure, including methods without a curve, so
    it is the same in all figures of the same methods.
    """
    if chosen is not None:
        own = [figure for figure in chosen if figure.setting == setting]
        return [replace(figure, methods=figure.methods or methods) for figure in own]
    groups = parts(methods)
    return [
        Figure(kind=kind, setting=setting, methods=[*group], name=str(number) * (len(groups) > 1))
        for kind in FIGURE_KINDS
        for number, group in enumerate(groups, 1)
    ]


def remove_others(written: Collection[str], folder: Path) -> None:
    """Delete figures of earlier calls that were not `written` by this call."""
    for kind in (*FIGURE_KINDS, METRIC):
        for path in folder.glob(f"{kind}*.svg"):
            if path.name not in written:
                path.unlink()


def _shows(kind: Kind, results: Sequence[Result]) -> bool:
    """Whether the method with these results has a curve in figures of this kind."""
    points = [point for result in results for point in result["curve"]]
    if kind.above_0:
        return any(has(point, kind.above_0) and point[kind.above_0] > 0 for point in points)
    return any(all(has(point, measure.key) for measure in kind.measures) for point in points)


def _panel(measure: Measure, shown: Mapping[int, str], methods: Mapping[str, Sequence[Result]]) -> Panel:
    curves = [Curve(name, place, over_seeds(methods[name], measure.key)) for place, name in shown.items()]
    return Panel(measure.label, curves, measure.factor, measure.top)
