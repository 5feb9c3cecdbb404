"""The live picture of a run at a terminal; fits 80 x 24 characters and uses more space if there is more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgpo_async.local.display import View
from sgpo_async.local.hub_rows import hub_rows
from sgpo_async.report.numbers import NONE, clock, number, percent

BARS = "▁▂▃▄▅▆▇█"
NOTES = 4  # lines of notes; the lines of benchmarks are subtracted
BENCHMARK = 40  # columns that a benchmark's score may take
ESTIMATE = 24  # ... of which its widest value, "100.0 % [100.0, 100.0]", takes so many with the gap before it
STYLES = {"serving": "green", "restarting": "yellow", "failed": "red", "lost": "red"}


class LivePicture:
    """Redraws in place. It has no thread of its own: only `show` draws."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def show(self, view: View) -> None:
        """Draw the view."""
        self._live.update(render(view, self._live.console.width), refresh=True)

    def close(self) -> None:
        """Keep the last picture on the screen and release the terminal."""
        self._live.stop()


def render(view: View, width: int) -> RenderableType:
    """The whole picture."""
    parts: list[RenderableType] = [_head(view, width), _bar(view), Text(), _rates(view, width)]
    parts += [Text(), _benchmarks(scores, width)] if (scores := view.benchmarks()) else []
    parts += [Text(), _facts(view)]
    parts += [sample] if (sample := _completion(view)) else []
    parts += [Text.assemble(("dashboard    ", "dim"), view.dashboard, no_wrap=True)] if view.dashboard else []
    parts += [Text(), _actors(view, width)]
    parts += [Text(alarm, style="bold red")] if (alarm := view.alarm()) else []
    notes = view.notes[-max(1, NOTES - _lines(scores, width)) :]
    firsts = (note.partition("\n")[0] for note in notes)
    parts += [Text(first, style="yellow", no_wrap=True, overflow="ellipsis") for first in firsts]
    parts += [Text(), _hub(view)] if view.details and view.status else []
    return Group(*parts)


def _head(view: View, width: int) -> RenderableType:
    grid = Table.grid(expand=True)
    grid.add_column()
    grid.add_column(justify="right")
    left = view.remaining_s()
    timing = f"{clock(view.elapsed_s)} elapsed" + (f", about {clock(left)} left" if left and width >= 60 else "")
    grid.add_row(Text.assemble((view.name, "bold"), "  ", (view.phase, "cyan")), timing)
    return grid


def _bar(view: View) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1)
    grid.add_column(justify="right")
    started = view.step > 0
    bar = ProgressBar(total=view.steps, completed=view.step, pulse=not started)
    grid.add_row(bar, f"step {view.step}/{view.steps}")
    return grid


def _rates(view: View, width: int) -> RenderableType:
    first, last = view.held_out()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("pass rate")
    for head in ("training", "held-out", "at first"):
        table.add_column(head, justify="right")
    room = min(60, width - 56)
    if room >= 10:
        table.add_column("over the steps", no_wrap=True)
    for name, key in (("autonomous", "pass_auto"), ("guided", "pass_guided")):
        cells = [name, percent(view.get(key)), percent(last.get(key)), percent(first.get(key))]
        table.add_row(*cells, *([sparkline([line.get(key) for line in view.history], room)] if room >= 10 else []))
    return table


def _benchmarks(scores: Sequence[Mapping[str, Any]], width: int) -> RenderableType:
    """avg@k as `math500@4  61.3 % [57.0, 65.4]`, as many side by side as have room. In brackets: 95 % intervals."""
    grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
    beside = _beside(width)
    for _ in range(beside):
        grid.add_column(style="dim", no_wrap=True, overflow="ellipsis", max_width=BENCHMARK - ESTIMATE)
        grid.add_column(no_wrap=True)
    cells = [Text(cell) for score in scores for cell in (f"{score['name']}@{score['samples']}", _estimate(score))]
    for first in range(0, len(cells), 2 * beside):
        grid.add_row(*cells[first : first + 2 * beside])
    return grid


def _beside(width: int) -> int:
    return max(1, width // BENCHMARK)


def _lines(scores: Sequence[Mapping[str, Any]], width: int) -> int:
    return -(-len(scores) // _beside(width))


def _estimate(score: Mapping[str, Any]) -> str:
    if score["avg"] is None:
        return NONE
    return f"{percent(score['avg']):>7} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _facts(view: View) -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0), expand=False)
    for _ in range(3):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, min_width=12)
    grid.add_row("mean alpha", number(view.get("alpha")), "lag", view.lag(), "tokens/s", view.tokens_per_s())
    idle = percent(view.get("learner_idle")), percent(view.get("engine_idle"))
    grid.add_row("trainer idle", idle[0], "engine idle", idle[1], "buffered", _buffered(view))
    grid.add_row("mismatch", view.mismatch(), "canary", view.canary(), "", "")
    return grid


def _completion(view: View) -> RenderableType | None:
    """The beginning of a completion, in one line."""
    found = view.completion()
    if found is None:
        return None
    mark = ("✓ ", "green") if found[0] else ("✗ ", "red")
    return Text.assemble(("sample       ", "dim"), mark, found[1], no_wrap=True, overflow="ellipsis")


def _hub(view: View) -> RenderableType:
    """Everything else that the hub says; at the end, where a small terminal cuts it off."""
    grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in hub_rows(view.status):
        grid.add_row(name, Text(value))
    return grid


def _buffered(view: View) -> str:
    groups = view.status.get("buffer")
    return NONE if groups is None else f"{groups} groups"


def _actors(view: View, width: int) -> RenderableType:
    gap = 1 if width < 100 else 3
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="dim")
    table.add_column("actor", no_wrap=True, min_width=9)
    table.add_column("state", no_wrap=True, min_width=10)
    for head in ("version", "running", "tokens", "tokens/s", "idle", "leases", "lag"):
        table.add_column(head, justify="right", no_wrap=True, min_width=6)
    for row in view.rows():
        state = str(row.get("state") or NONE)
        figures = [number(row.get(key)) for key in ("version", "running", "tokens", "tokens_per_s")]
        tail = [percent(row.get("idle")), _count(row.get("leases")), _lag(row.get("lag"))]
        table.add_row(Text(str(row["name"])), Text(state, style=STYLES.get(state, "")), *figures, *tail)
    return table


def _count(leases: Any) -> str:
    return number(len(leases) if isinstance(leases, list | tuple) else leases)


def _lag(lag: Any) -> str:
    return number(lag.get("mean") if isinstance(lag, dict) else lag)


def sparkline(shares: list[float | None], width: int) -> str:
    """Values in [0, 1] as a row of bars, averaged down to at most `width` of them."""
    values = [share for share in shares if share is not None]
    bins = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    if len(values) <= width:
        bins = [[value] for value in values]
    return "".join(BARS[min(7, max(0, int(8 * sum(part) / len(part))))] for part in bins if part)
