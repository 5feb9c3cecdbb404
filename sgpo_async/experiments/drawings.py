"""Which figures a setting gets: pass rates, beside them mean alpha and what the mask takes; entropy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sgpo_async.config.experiment import FIGURE_KINDS, Figure
from sgpo_async.experiments.curves import over_seeds
from sgpo_async.experiments.figures import Curve, Panel, draw, parts
from sgpo_async.experiments.plan import Result


class Measure(NamedTuple):
    """Something that stands in the points of a curve."""

    key: str
    label: str
    factor: float = 1.0
    top: float | None = None


class Kind(NamedTuple):
    """A kind of figure."""

    title: str
    measures: tuple[Measure, ...]
    above_0: str = ""  # only of methods that have this above 0 somewhere


PASS_RATE = Measure("auto", "validation pass rate alone, %", 100, 100)
KINDS = {  # those of FIGURE_KINDS
    "curves": Kind("pass rate over rollouts", (PASS_RATE,)),
    "alpha": Kind("pass rate and mean alpha over rollouts", (PASS_RATE, Measure("alpha", "mean alpha")), "alpha"),
    "masked": Kind(
        "pass rate, and the share of the KL that the mask takes or would take, over rollouts",
        (PASS_RATE, Measure("kl_masked_mass", "share of the KL where d > delta, %", 100, 100)),
        "kl_masked_mass",
    ),
    "entropy": Kind("entropy over rollouts", (Measure("entropy", "entropy, nats per token"),)),
}


def draw_setting(
    setting: str,
    methods: Mapping[str, Sequence[Result]],
    folder: Path,
    chosen: Sequence[Figure] | None = None,
) -> dict[str, str]:
    """Write the figures of a setting, those in which some method has something to show; returns file -> kind.

    Args:
        chosen: the figures of the page, of all settings; default: every kind.
    """
    written: dict[str, str] = {}
    for figure in _figures(setting, [*methods], chosen):
        kind = KINDS[figure.kind]
        shown = {place: name for place, name in enumerate(figure.methods) if _shows(kind, methods[name])}
        if shown:
            file = f"{figure.stem}.svg"
            draw([_panel(measure, shown, methods) for measure in kind.measures], folder / file)
            written[file] = figure.kind
    return written


def _figures(setting: str, methods: list[str], chosen: Sequence[Figure] | None) -> list[Figure]:
    """Those chosen for this setting; else every kind, of all methods, in as many parts as they need.

    A method has the same colour in figures of the same methods: its place among them decides, and not which of them
    have something to show.
    """
    if chosen is not None:
        mine = [figure for figure in chosen if figure.setting == setting]
        return [replace(figure, methods=figure.methods or methods) for figure in mine]
    groups = parts(methods)
    return [
        Figure(kind=kind, setting=setting, methods=[*group], name=str(number) * (len(groups) > 1))
        for kind in FIGURE_KINDS
        for number, group in enumerate(groups, 1)
    ]


def remove_others(written: Collection[str], folder: Path) -> None:
    """Delete figures of an earlier call that are not among those `written` now."""
    for kind in FIGURE_KINDS:
        for path in folder.glob(f"{kind}*.svg"):
            if path.name not in written:
                path.unlink()


def _shows(kind: Kind, results: Sequence[Result]) -> bool:
    """Whether the method with these results has a curve in figures of this kind."""
    points = [point for result in results for point in result["curve"]]
    if kind.above_0:
        return any(point.get(kind.above_0, 0.0) > 0 for point in points)
    return any(measure.key in point for point in points for measure in kind.measures)


def _panel(measure: Measure, shown: Mapping[int, str], methods: Mapping[str, Sequence[Result]]) -> Panel:
    curves = [Curve(name, place, over_seeds(methods[name], measure.key)) for place, name in shown.items()]
    return Panel(measure.label, curves, measure.factor, measure.top)
