"""The live picture of a run at a terminal; fits 60 x 24 characters and uses more space if there is more."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sgpo_async.local.display import Display, Lines, View
from sgpo_async.local.hub_rows import hub_rows
from sgpo_async.report.numbers import NONE, clock, number, percent

BARS = "▁▂▃▄▅▆▇█"
NOTES = 4  # lines of notes; the lines of benchmarks are subtracted
BENCHMARK = 40  # columns that a benchmark's score may take
ESTIMATE = 24  # ... of which its widest value, "100.0 % [100.0, 100.0]", takes so many with the gap before it
ACTORS = 3  # that are shown before a second note
NARROW = 78  # columns: with fewer, the picture leaves out what is least needed
STYLES = {"serving": "green", "restarting": "yellow", "failed": "red", "lost": "red"}
ACTOR = {  # column of the table of actors: key of its row; those of a narrow terminal are in BRIEF
    "version": "version",
    "running": "running",
    "tokens": "tokens",
    "tokens/s": "tokens_per_s",
    "idle": "idle",
    "leases": "leases",
    "lag": "lag",
}
BRIEF = ("version", "tokens/s", "idle", "lag")


class LivePicture:
    """Draws the whole screen anew each time, so that a terminal whose size changes keeps nothing of the old picture.

    It uses the terminal's alternate screen: what was there before comes back at the end, with the last picture below.
    What is printed on standard error meanwhile, such as log lines, follows it. It has no thread of its own: only `show`
    draws.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view: View | None = None
        self._held = io.StringIO()
        self._stderr = contextlib.redirect_stderr(self._held)
        self._stderr.__enter__()
        self._live = Live(
            console=console, auto_refresh=False, screen=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def show(self, view: View) -> None:
        """Draw the view."""
        self._view = view
        with contextlib.suppress(OSError, ValueError):  # no terminal, but told to take it for one
            # The console asks the variable COLUMNS first, which does not follow the terminal.
            self._console.size = ConsoleDimensions(*os.get_terminal_size(self._console.file.fileno()))
        width, height = self._console.size
        self._live.update(render(view, width, height), refresh=True)

    def close(self) -> None:
        """Release the terminal; leave the last picture and what was printed meanwhile. It may be called again."""
        if self._live.is_started:
            self._live.stop()
            self._stderr.__exit__(None, None, None)
            if self._view is not None:
                self._console.print(render(self._view, self._console.width))
            print(self._held.getvalue(), end="", file=sys.stderr, flush=True)


def display_on(console: Console) -> Display:
    """The display for this console: the picture at a terminal that can move its cursor, else lines."""
    return LivePicture(console) if console.is_terminal and not console.is_dumb_terminal else Lines()


def render(view: View, width: int, height: int | None = None) -> RenderableType:
    """The whole picture; with a height, actors that do not fit are counted instead of shown."""
    scores = view.benchmarks()
    above: list[RenderableType] = [_head(view, width), _bar(view), Text(), _rates(view, width)]
    above += [Text(), _benchmarks(scores, width)] if scores else []
    above += [Text(), _facts(view, width)]
    above += [sample] if (sample := _completion(view)) else []
    above += [Text.assemble(("dashboard    ", "dim"), view.dashboard, no_wrap=True)] if view.dashboard else []
    alarms: list[RenderableType] = [Text(alarm, style="bold red")] if (alarm := view.alarm()) else []
    notes: list[RenderableType] = [_note(note) for note in view.notes[-max(1, NOTES - _lines(scores, width)) :]]
    room = None if height is None else height - _rows([*above, *alarms], width) - 2  # an empty line, the heads
    if room is not None:
        notes = notes[-max(1, room - min(ACTORS, len(view.rows()))) :]
        room = max(1, room - len(notes))
    hub = [Text(), _hub(view)] if view.details and view.status else []
    return Group(*above, Text(), _actors(view, width, room), *alarms, *notes, *hub)


def _note(note: str) -> Text:
    """The first line of a note."""
    return Text(note.partition("\n")[0], style="yellow", no_wrap=True, overflow="ellipsis")


def _rows(parts: Sequence[RenderableType], width: int) -> int:
    """How many lines these take."""
    console = Console(width=width, markup=False, emoji=False, file=io.StringIO())
    return len(console.render_lines(Group(*parts)))


def _head(view: View, width: int) -> RenderableType:
    grid = Table.grid(expand=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
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
    for name, key in (("alone", "pass_auto"), ("guided", "pass_guided")):
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


def _facts(view: View, width: int) -> RenderableType:
    facts = [
        ("mean alpha", number(view.get("alpha"))),
        ("lag", view.lag()),
        ("tokens/s", view.tokens_per_s()),
        ("trainer idle", percent(view.get("learner_idle"))),
        ("engine idle", percent(view.get("engine_idle"))),
        ("buffered", _buffered(view)),
        ("mismatch", view.mismatch()),
        ("canary", view.canary()),
    ]
    beside = 2 if width < NARROW else 3
    grid = Table.grid(padding=(0, 1, 0, 0), expand=False)
    for _ in range(beside):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, min_width=14)
    for first in range(0, len(facts), beside):
        grid.add_row(*(cell for fact in facts[first : first + beside] for cell in fact))
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


def _actors(view: View, width: int, room: int | None) -> RenderableType:
    """One row per actor; with more than `room`, first those that do not serve, and the number of the others."""
    rows = view.rows()
    shown = rows
    if room is not None and len(rows) > room:
        shown = sorted(rows, key=lambda row: row.get("state") == "serving")[: room - 1]
    heads = [head for head in ACTOR if width >= NARROW or head in BRIEF]
    table = Table(box=None, padding=(0, 1 if width < 100 else 3, 0, 0), header_style="dim")
    table.add_column("actor", no_wrap=True, min_width=9)
    table.add_column("state", no_wrap=True, min_width=10)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, min_width=6)
    for row in shown:
        state = str(row.get("state") or NONE)
        cells = [_cell(head, row.get(ACTOR[head])) for head in heads]
        table.add_row(Text(str(row["name"])), Text(state, style=STYLES.get(state, "")), *cells)
    if len(shown) < len(rows):
        table.add_row(Text(f"{len(rows) - len(shown)} more", style="dim"))
    return table


def _cell(head: str, value: Any) -> str:
    if head == "idle":
        return percent(value)
    if head == "leases":
        return _count(value)
    return _lag(value) if head == "lag" else number(value)


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
