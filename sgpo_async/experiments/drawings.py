"""Which figures a setting gets: pass rates, beside them mean alpha and what the mask takes; entropy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sgpo_async.config.experiment import slug
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

    file: str
    title: str
    measures: tuple[Measure, ...]
    above_0: str = ""  # only of methods that have this above 0 somewhere


PASS_RATE = Measure("auto", "validation pass rate alone, %", 100, 100)
KINDS = (
    Kind("curves", "pass rate over rollouts", (PASS_RATE,)),
    Kind("alpha", "pass rate and mean alpha over rollouts", (PASS_RATE, Measure("alpha", "mean alpha")), "alpha"),
    Kind(
        "masked",
        "pass rate, and the share of the KL that the mask takes or would take, over rollouts",
        (PASS_RATE, Measure("kl_masked_mass", "share of the KL where d > delta, %", 100, 100)),
        "kl_masked_mass",
    ),
    Kind("entropy", "entropy over rollouts", (Measure("entropy", "entropy, nats per token"),)),
)


def draw_setting(setting: str, methods: Mapping[str, Sequence[Result]], folder: Path) -> dict[str, str]:
    """Write the figures of a setting; file -> title, kind by kind, each kind in the order of the methods.

    A method has the same colour in all of them: who shares a figure is decided by all methods, and not by those that
    have something to show in it.
    """
    groups = parts([*methods])
    written: dict[str, str] = {}
    for kind in KINDS:
        for number, group in enumerate(groups, 1):
            shown = {place: name for place, name in enumerate(group) if _shows(kind, methods[name])}
            if shown:
                words = [kind.file, slug(setting), str(number) * (len(groups) > 1)]
                file = "-".join(word for word in words if word) + ".svg"
                draw([_panel(measure, shown, methods) for measure in kind.measures], folder / file)
                written[file] = kind.title
    return written


def remove_others(written: Collection[str], folder: Path) -> None:
    """Delete figures of an earlier call that are not among those `written` now."""
    for kind in KINDS:
        for path in folder.glob(f"{kind.file}*.svg"):
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
