"""The sections of the page as HTML. Every text is escaped in `cell`, `_tile` and the functions of `report`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from sgpo_async.dashboard.observer import RunView
from sgpo_async.local.hub_rows import hub_rows
from sgpo_async.local.remote import unknown
from sgpo_async.logs import one_line, printable
from sgpo_async.report.advisories import RECENT, Advisory
from sgpo_async.report.charts import GROUPS, figures, other_figures
from sgpo_async.report.closing import summarise, summary_rows
from sgpo_async.report.completions import group
from sgpo_async.report.document import with_code
from sgpo_async.report.numbers import NONE, clock, number, percent, scientific
from sgpo_async.report.texts import solved
from sgpo_async.report.thin import thinned

POINTS = 240  # of a curve
GROUPS_SHOWN = 8  # groups of completions
NUMBERS = ("version", "lag", "leases", "running", "tokens/s", "idle", "canary, nats")
COLUMNS = ("actor", "state", *NUMBERS, "weights from")  # of the fleet
SERVERS = 32  # of an actor that are listed
PARTS = ("trained", "buffered", "in flight", "dropped")  # of what the ledger has dispatched


def sections(run: RunView, advice: Sequence[Advisory]) -> dict[str, str]:
    """Return the HTML of every section without curves and completions, by the id of its place in the page."""
    return {
        "headline": headline(run),
        "advice": advisories(advice, run),
        "fleet": fleet(run),
        "ledger": ledger(run),
        "idle": idle(run),
        "details": details(run),
    }


def headline(run: RunView) -> str:
    """Name, state, progress, and the figures that everybody asks for."""
    view = run.view
    left = view.remaining_s() if run.state == "training" else None
    timing = f"{clock(view.elapsed_s)} elapsed" + (f", about {clock(left)} left" if left else "")
    facts = " · ".join([f"step {view.step} of {view.steps}", timing, *([run.hub] if run.hub else [])])
    _, held_out = view.held_out()
    evaluated = held_out or {key: view.metrics.get(f"eval_{key}") for key in ("pass_auto", "pass_guided")}
    tiles = [
        (percent(view.get("pass_auto")), "solved alone, training"),
        (percent(view.get("pass_guided")), "solved with strategies"),
        (percent(evaluated.get("pass_auto")), "solved alone, held-out"),
        (view.tokens_per_s(), "tokens per second"),
        (view.lag(), "lag in versions"),
        (view.mismatch(), "mismatch at lag 0"),
        *((percent(score["avg"]), f"{score['name']}, avg@{score['samples']}") for score in view.benchmarks()),
    ]
    phase = escape(printable(view.phase)) if view.phase != run.state else ""
    state = f'<b class="state {run.state}">{run.state}</b> {phase}'
    return (
        f"<h1>{escape(view.name)}</h1><p>{state}</p>"
        f'<p class="soft">{escape(facts)}</p>{_progress(view.step, view.steps)}'
        f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'
    )


def advisories(advice: Sequence[Advisory], run: RunView) -> str:
    """What is wrong, its evidence and its remedy."""
    rows = [
        f'<li class="{one.severity}"><b>{escape(one.what)}</b> {escape(one.evidence)}'
        f'<span class="remedy">{with_code(one.remedy)}</span></li>'
        for one in advice
    ]
    if run.error:
        rows.insert(
            0, f'<li class="alarm"><b>The dashboard cannot read the run</b> {escape(printable(run.error))}</li>'
        )
    return f"<ul>{''.join(rows)}</ul>" if rows else '<p class="soft">Nothing to advise.</p>'


def fleet(run: RunView) -> str:
    """One row per actor, and those in quarantine."""
    status = run.view.status
    rows = [_actor(actor) for actor in run.view.rows()]
    quarantined = (status.get("quarantined") or {}).items()
    rows += [
        f'<tr class="bad">{cell(one_line(name, 64), "name")}{cell("quarantined")}'
        f'<td colspan="{len(COLUMNS) - 2}">{escape(one_line(why, 400))}</td></tr>'
        for name, why in quarantined
    ]
    if not rows:
        count = run.view.metrics.get("actors")
        known = f"; {count} at the last step" if count is not None and not status else ""
        return f'<p class="soft">No actor is connected{known}.</p>'
    names = "".join(f'<th class="{"n" if head in NUMBERS else ""}">{head}</th>' for head in COLUMNS)
    return f'<table class="grid-table"><tr>{names}</tr>{"".join(rows)}</table>'


def _actor(actor: Mapping[str, Any]) -> str:
    get = actor.get
    figures = [number(get(key)) for key in ("version", "lag", "leases", "running", "tokens_per_s")]
    canary = scientific(get("canary")) if get("canary") is not None else NONE
    source = one_line(get("source") or "hub", 64)
    row = cell(get("name"), "name") + cell(get("state"), "good" if get("state") == "serving" else "")
    row += "".join(cell(figure, "n") for figure in (*figures, percent(get("idle")), canary)) + cell(source)
    servers = [_server(server) for server in (get("servers") or [])[:SERVERS]]
    return f"<tr>{row}</tr>{''.join(servers)}"


def _server(server: Mapping[str, Any]) -> str:
    """What one server of an actor serves, as its last canary said."""
    serves = cell(one_line(server.get("url"), 64), "name") + cell("") + cell(number(server.get("version")), "n")
    checked = cell(scientific(server.get("canary")), "n") + cell(server.get("digest"))
    return f'<tr class="server">{serves}{"<td></td>" * 5}{checked}</tr>'


def ledger(run: RunView) -> str:
    """What was dispatched, and what became of it: a bar, and numbers that must add up."""
    status, metrics = run.view.status, run.view.metrics
    own = status.get("ledger") or metrics.get("ledger") or run.summary.get("ledger") or {}
    if not own:
        return '<p class="soft">Nothing was dispatched yet.</p>'
    accounts = {"rollouts": own.get("rollouts") or {}, "tasks": own}
    if evaluation := status.get("evaluation_ledger"):
        accounts["evaluation rollouts"] = evaluation.get("rollouts") or {}
    body = "".join(_account(name, account) for name, account in accounts.items() if account)
    heads = "<th></th>" + "".join(f'<th class="n">{head}</th>' for head in ("dispatched =", *PARTS))
    bar = stack([(name, count) for name, count in balance(accounts["rollouts"] or own)[1:]])
    return f'{bar}<table class="grid-table"><tr>{heads}</tr>{body}</table>'


def balance(account: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return ("dispatched", count), then the count of each of PARTS."""
    dropped = account.get("dropped") or {}
    lost = sum(dropped.values()) if isinstance(dropped, Mapping) else dropped
    counts = [account.get(key) or 0 for key in ("dispatched", "trained", "buffered", "in_flight")]
    return list(zip(("dispatched", *PARTS), [*counts, lost], strict=True))


def _account(name: str, account: Mapping[str, Any]) -> str:
    counts = balance(account)
    balanced = counts[0][1] == sum(count for _, count in counts[1:])
    row = cell(name) + "".join(cell(f"{count:,}", "n") for _, count in counts)
    notes = [f"{one_line(why, 64)} {count:,}" for why, count in (account.get("dropped") or {}).items() if count]
    extra = (
        f'<tr class="server"><td></td><td colspan="5">dropped: {escape(", ".join(notes))}</td></tr>' if notes else ""
    )
    alarm = "" if balanced else '<tr class="bad"><td colspan="6">The numbers do not add up.</td></tr>'
    return f"<tr>{row}</tr>{extra}{alarm}"


def idle(run: RunView) -> str:
    """For what trainer and engines wait."""
    lines = run.view.history[-RECENT:]
    waits = [line["learner_waits"] for line in lines if line.get("learner_waits")]
    engines = run.view.get("engine_waits") or {}
    parts = []
    if waits:
        shares = [(f"waits for {cause}", fmean(wait[cause] for wait in waits)) for cause in waits[0]]
        parts.append(_shares(f"Trainer, last {len(waits)} steps", "works", shares))
    if engines:
        shares = [(f"wait for {cause}", share) for cause, share in engines.items()]
        parts.append(_shares("Engines, since the hub began", "work", shares))
    return "".join(parts) or '<p class="soft">Not measured yet.</p>'


def _shares(title: str, rest: str, shares: Sequence[tuple[str, float]]) -> str:
    known = [(rest, max(0.0, 1 - sum(share for _, share in shares))), *shares]
    return f"<h3>{escape(title)}</h3>{stack(known, show=percent)}"


def stack(parts: Sequence[tuple[str, float]], *, show: Any = number) -> str:
    """Draw parts of a whole as one bar, with a legend."""
    whole, at, boxes, keys = sum(value for _, value in parts) or 1, 0.0, [], []
    for index, (name, value) in enumerate(parts):
        width = 1000 * value / whole
        label = escape(printable(f"{name} {show(value)}"))
        boxes.append(
            f'<rect class="s{index}" x="{at:.1f}" width="{width:.1f}" height="18"><title>{label}</title></rect>'
        )
        keys.append(f'<span class="key"><i class="s{index}"></i>{label}</span>')
        at += width
    picture = f'<svg class="stack" viewBox="0 0 1000 18" preserveAspectRatio="none" role="img">{"".join(boxes)}</svg>'
    return f'{picture}<div class="legend">{"".join(keys)}</div>'


def details(run: RunView) -> str:
    """Everything else that the hub says, or without a hub the final metrics."""
    if run.view.status:
        rows = hub_rows(run.view.status)
    else:
        rows = summary_rows(run.summary or summarise(run.view.history))
    return f"<table>{''.join(f'<tr>{cell(name)}{cell(value)}</tr>' for name, value in rows)}</table>"


def curves(run: RunView, *, all_metrics: bool) -> str:
    """The charts of report.html, by group; with `all_metrics` also numbers that have no chart of their own."""
    lines = thinned(run.view.history, POINTS)
    if not lines:
        return '<section><p class="soft">No step is trained yet.</p></section>'
    found = figures(lines) + (other_figures(lines) if all_metrics else [])
    missing = "" if run.view.metrics else f'<p class="soft">{escape(unknown(run.settings))}</p>'
    return missing + "".join(
        f'<h2>{escape(title)}</h2><div class="charts">{"".join(own)}</div>'
        for name, title in GROUPS.items()
        if (own := [html for group_name, html in found if group_name == name])
    )


def samples(run: RunView, *, outcome: str = "", problem: str = "") -> str:
    """The newest completions, the newest first; `outcome`: only those "solved" or "unsolved" without a strategy."""
    fitting = [
        sample
        for sample in reversed(run.samples)
        if problem.lower() in str(sample.get("problem")).lower()
        and (outcome not in ("solved", "unsolved") or (solved(sample)[0] > 0) == (outcome == "solved"))
    ]
    if not fitting:
        text = (
            f"None of the newest {len(run.samples)} groups fits." if run.samples else "There are no completions here."
        )
        return f'<p class="soft">{text}</p>'
    return "".join(group(sample, shown=not index) for index, sample in enumerate(fitting[:GROUPS_SHOWN]))


def cell(value: object, css: str = "") -> str:
    """A cell of a table; control characters as escapes."""
    return f'<td class="{css}">{escape(printable(str(NONE if value is None else value)))}</td>'


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(printable(name))}</span></div>'


def _progress(step: int, steps: int) -> str:
    return f'<progress max="{max(steps, 1)}" value="{min(step, max(steps, 1))}"></progress>'


def newest_step(lines: Iterable[Mapping[str, Any]]) -> int:
    """The step of the last line; -1 without lines."""
    return max((line["step"] for line in lines), default=-1)
