"""Pictures of what a benchmark has measured, as SVG beside its table and JSON.

They are drawn from the JSON: `python -m sgpo_async.bench.pictures docs/results` draws those of earlier results again.
They need matplotlib (`pip install sgpo-async[experiments]`). Without it a line says so, and the table is the result.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sgpo_async.files import write_whole
from sgpo_async.report.figure import figure_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable side by side, also for red-green colour blindness.
WORK, OTHERS = "#1f77b4", ("#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
WAITS, WAITING = "waits for data", "#b8c0c8"
SHARE = 2.0  # an axis that is shorter shows shares

Parts = Mapping[str, float]  # share by what it is
Bar = tuple[str, Parts, str]  # its name, its parts one after the other, and what stands behind it


@dataclass(frozen=True)
class Picture:
    """Horizontal bars."""

    name: str  # of the file, without .svg
    title: str
    axis: str  # what the length of a bar is
    bars: Sequence[Bar]


LEARNERS_TIME = "share of the learner's time"


def _overlap(found: Any) -> Iterator[Picture]:
    for number, scenario in enumerate(found, 1):
        bars = []
        for row in scenario["rows"]:
            phases = dict.fromkeys(phase for seed in row["seeds"] for phase in seed["learner"])
            parts = {phase: median(seed["learner"].get(phase, 0.0) for seed in row["seeds"]) for phase in phases}
            rate = median(seed["tokens_per_s"] for seed in row["seeds"])
            work = {"trains": parts.pop("trains")}
            bars.append((row["setting"], work | parts, f"{rate:,.0f} tokens/s, {row['of_bound']:.2f} of the bound"))
        yield Picture(f"overlap-{number}", f"{scenario['scenario']} (simulated)", LEARNERS_TIME, bars)


def _pinned(found: Any) -> Iterator[Picture]:
    bars = []
    for lag, runs in found.items():
        waits, rate = (median(run[key] for run in runs) for key in ("learner_idle", "problems_per_s"))
        bars.append((f"lag {lag}", {"trains": 1 - waits, WAITS: waits}, f"{rate:.0f} problems/s"))
    yield Picture("pinned", "The demo, a core for each side", LEARNERS_TIME, bars)


def _scale(found: Any) -> Iterator[Picture]:
    bars = [
        (
            f"nodes: {size['nodes']}",
            {"trains": size["of_ceiling"], WAITS: 1 - size["of_ceiling"]},
            f"{size['rollouts_per_s']:,.0f} rollouts/s, hub {size['hub_ms']:.2f} ms each",
        )
        for size in found
    ]
    yield Picture("scale", "One hub, simulated nodes of one GPU (7B)", LEARNERS_TIME, bars)


def _transport(found: Any) -> Iterator[Picture]:
    rates = found["rollouts_per_s"].items()
    bars = [(name, {"": rate["median"]}, f"{rate['low']:,.0f} to {rate['high']:,.0f}") for name, rate in rates]
    title = f"Rollouts of {found['sizes']['tokens']} tokens from one producer into a receiver"
    yield Picture("transport", title, "rollouts a second, median", bars)


PICTURES: dict[str, Callable[[Any], Iterator[Picture]]] = {
    "overlap": _overlap,
    "pinned": _pinned,
    "scale": _scale,
    "transport": _transport,
}


def draw(part: str, folder: Path) -> None:
    """Draw the pictures of the results of this part of the benchmark in `folder`, if it has any."""
    results = folder / f"{part}.json"
    if part not in PICTURES or not results.exists():
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{part}: no pictures, because matplotlib is not installed: pip install 'sgpo-async[experiments]'")
        return
    for picture in PICTURES[part](json.loads(results.read_text(encoding="utf-8"))):
        write_whole(folder / f"{picture.name}.svg", drawn(picture))


def drawn(picture: Picture) -> str:
    """The picture as SVG, the same for the same figures."""
    size = (7.5, 1.3 + 0.3 * len(picture.bars))
    return figure_svg(size, lambda figure: _draw(picture, figure), **{"font.size": 9})


def _draw(picture: Picture, figure: Figure) -> None:
    places = range(len(picture.bars))
    names = list(dict.fromkeys(name for _, parts, _ in picture.bars for name in parts))
    axes = figure.subplots()
    ends = [0.0] * len(places)
    colours = iter((WORK, *OTHERS))
    for name in names:
        colour = WAITING if name == WAITS else next(colours)
        widths = [parts.get(name, 0.0) for _, parts, _ in picture.bars]
        axes.barh(places, widths, left=ends, color=colour, height=0.7, label=name)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, end, (_, _, text) in zip(places, ends, picture.bars, strict=True):
        axes.text(end + 0.01 * max(ends), place, text, va="center", fontsize=8)
    axes.set_yticks(places, [name for name, _, _ in picture.bars])
    axes.invert_yaxis()
    axes.set(title=picture.title, xlabel=picture.axis, xlim=(0, 1.45 * max(ends)))
    axes.xaxis.set_major_formatter("{x:.0%}" if max(ends) < SHARE else "{x:,.0f}")
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1.01 * max(ends)])
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)


def main(folders: Sequence[str]) -> int:
    """Draw what is below these folders."""
    for folder in folders:
        for part in PICTURES:
            draw(part, Path(folder) / part)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
