"""A group of samples.jsonl as text for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from sgpo_async.logs import printable
from sgpo_async.report.numbers import number
from sgpo_async.report.texts import (
    LEFT_OUT,
    Run,
    alike,
    context_of,
    distilled_note,
    notes_of,
    runs_of,
    sibling_note,
    solved,
    versions_of,
)

LARGE, SMALL = 1.0, 0.1  # nats; a token of at least this divergence is highlighted
STYLES = {LARGE: "black on red", SMALL: "black on yellow"}
LEGEND = f"Tokens of distilled completions are yellow from {SMALL:g} nats and red from {LARGE:g}. {LEFT_OUT}"
SIDE_BY_SIDE = 120  # columns from which on alone and guided are side by side
LARGEST = 3  # tokens of the largest divergences that are listed
PIECE = 24  # characters of each


def render(sample: Mapping[str, Any], *, chars: int) -> RenderableType:
    """The problem, the rollouts of the policy alone and those with the strategy or another context.

    Args:
        chars: most characters of each completion; 0: all.
    """
    about = Table.grid(padding=(0, 2, 0, 0))
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    context = printable(context_of(sample))
    for key, name in (("problem", "problem"), ("strategy", context), ("answer", "answer")):
        if sample.get(key) is not None:
            about.add_row(Text(name), Text(printable(str(sample[key]))))
    tables = []
    for guided in (False, True):
        if any(rollout["guided"] == guided for rollout in sample["rollouts"]):
            right, count = solved(sample, guided=guided)
            heading = f"{f'with the {context}' if guided else 'alone'}: {right} of {count} correct"
            tables.append(_rollouts(sample, guided, heading, chars))
    return Group(_title(sample), about, Text(), _Sides(tables), Text())


class _Sides:
    """Tables side by side where there is room, else one below the other."""

    def __init__(self, tables: Sequence[RenderableType]) -> None:
        self._tables = tables

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self._tables) < 2 or options.max_width < SIDE_BY_SIDE:
            for number, table in enumerate(self._tables):
                yield from [Text(), table] if number else [table]
            return
        sides = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for _ in self._tables:
            sides.add_column(ratio=1)
        sides.add_row(*self._tables)
        yield sides


def _title(sample: Mapping[str, Any]) -> Text:
    facts = f"  task {sample.get('task')}  weights {sample.get('version')}  alpha {number(sample.get('alpha'))}"
    return Text.assemble((f"step {sample['step']}", "bold"), (facts, "dim"))


def _rollouts(sample: Mapping[str, Any], guided: bool, heading: str, chars: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("version", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column(heading, overflow="fold")
    for rollout, count in alike(one for one in sample["rollouts"] if one["guided"] == guided):
        mark = Text("✓", style="green") if rollout["correct"] else Text("✗", style="red")
        table.add_row(mark, versions_of(rollout), str(rollout["tokens"]), _completion(rollout, count, chars))
        if "kl" in rollout:
            table.add_row("", "", "", _divergences(rollout))
        if note := sibling_note(rollout, sample):
            table.add_row("", "", "", Text(printable(note), style="dim"))
    return table


def _completion(rollout: Mapping[str, Any], count: int, chars: int) -> Text:
    text, notes = text_of(runs_of(rollout, chars=chars)), notes_of(rollout, count)
    return text.append(f" [{notes}]", style="dim") if notes else text


def text_of(runs: Sequence[Run]) -> Text:
    """Runs as text, with tokens of a large divergence highlighted, and those that are not distilled struck through."""
    text = Text()
    for part, kl, left_out in runs:
        styles = [style for least, style in STYLES.items() if kl is not None and kl >= least][:1]
        styles += ["strike"] * left_out
        text.append(printable(part), style=" ".join(styles))
    return text


def _divergences(rollout: Mapping[str, Any]) -> Text:
    """A line about the divergences of a distilled completion, which also says without colours where they are large."""
    known = [(kl, piece) for kl, piece in zip(rollout["kl"], rollout["pieces"], strict=True) if kl is not None]
    largest = sorted(known, key=lambda one: -one[0])[:LARGEST]
    tokens = ", ".join(f"{printable(repr(piece[:PIECE]))} {number(kl)}" for kl, piece in largest)
    mean = number(sum(kl for kl, _ in known) / max(len(known), 1))
    return Text(f"{distilled_note(rollout)}; divergence in nats: mean {mean}, largest {tokens}", style="dim")
