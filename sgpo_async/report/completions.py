"""Completions of samples.jsonl in HTML: some groups for the page of a run, or a page of chosen groups.

The autonomous completions of a group stand beside the guided ones, so that one sees what a strategy changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sgpo_async.logs import printable
from sgpo_async.report.document import document
from sgpo_async.report.numbers import number
from sgpo_async.report.style import SHADES
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
    strength,
    versions_of,
)

CHARS = 1500  # of each completion

SHADING = (
    "The shading of a distilled completion shows the divergence of each token between the distributions with and "
    "without the context (Eq. 3); hover over a token for its value."
)
LEGEND = f"{SHADING} {LEFT_OUT}"


def completions(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML of the section, empty without samples."""
    if not samples:
        return ""
    chosen = [samples[i] for i in sorted({0, len(samples) // 2, len(samples) - 1})]
    groups = "".join(group(sample, shown=number == len(chosen) - 1) for number, sample in enumerate(chosen))
    caption = f"Groups of the first, a middle and the last kept step. {LEGEND}"
    more = "<p>All of them: <code>sgpo-async samples RUN --last 100 --html FILE</code></p>"
    return f'<section class="samples"><h2>Completions</h2><p>{caption}</p>{groups}{more}</section>'


def samples_page(name: str, samples: Sequence[Mapping[str, Any]], *, chars: int) -> str:
    """A page of these groups, all unfolded, with at most `chars` characters of each completion (0: all)."""
    groups = "".join(group(sample, shown=True, chars=chars) for sample in samples)
    section = f'<section class="samples"><p>{LEGEND}</p>{groups}</section>'
    return document(f"Completions of {name}", [f"<header><h1>{escape(name)}</h1></header>", section])


def group(sample: Mapping[str, Any], *, shown: bool, chars: int = CHARS) -> str:
    """One group; `shown`: unfolded from the start."""
    (alone, autonomous), (helped, guided) = solved(sample), solved(sample, guided=True)
    facts = [f"alone {alone} of {autonomous} correct"]
    context = context_of(sample)
    facts += [f"with the {context} {helped} of {guided}"] if guided else []
    facts += [f"alpha {number(sample.get('alpha'))}"]
    head = f"<summary><b>step {sample['step']}</b> {escape(', '.join(facts))}</summary>"
    names = {"problem": "problem", "strategy": context, "answer": "answer"}
    about = [(name, sample[key]) for key, name in names.items() if sample.get(key) is not None]
    rows = "".join(f"<tr><td>{_text(name)}</td><td><q>{_text(str(value))}</q></td></tr>" for name, value in about)
    sides = _rollouts(sample, guided=False, heading="alone", chars=chars)
    sides += _rollouts(sample, guided=True, heading=f"with the {context}", chars=chars)
    name = _text(f"{sample['step']}-{sample.get('task')}")
    tables = f'<table>{rows}</table><div class="sides">{sides}</div>'
    return f'<details{" open" * shown} data-name="{name}">{head}{tables}</details>'


def _rollouts(sample: Mapping[str, Any], *, guided: bool, heading: str, chars: int) -> str:
    side = alike(one for one in sample["rollouts"] if one["guided"] == guided)
    own = "".join(_rollout(one, count, sample, chars) for one, count in side)
    columns = f'<td class="n">version</td><td class="n">tokens</td><td>{_text(heading)}</td>'
    return f'<table><tr class="head"><td></td>{columns}</tr>{own}</table>' if own else ""


def _rollout(rollout: Mapping[str, Any], count: int, sample: Mapping[str, Any], chars: int) -> str:
    right = rollout["correct"]
    mark = f'<td class="{"right" if right else "wrong"}">{"✓" if right else "✗"}</td>'
    notes = ", ".join(filter(None, (distilled_note(rollout), notes_of(rollout, count))))
    lines = filter(None, (notes, sibling_note(rollout, sample)))
    note = "".join(f"<i>{_text(line)}</i>" for line in lines)
    text = "".join(_run(run) for run in runs_of(rollout, chars=chars))
    figures = f'<td class="n">{versions_of(rollout)}</td><td class="n">{rollout["tokens"]}</td>'
    return f"<tr>{mark}{figures}<td><q>{text}</q>{note}</td></tr>"


def _run(run: Run) -> str:
    shade = round(SHADES * strength(run.kl))
    classes = [f"k{shade}"] * bool(shade) + ["left-out"] * run.left_out
    if not classes:
        return _text(run.text)
    known = [] if run.kl is None else [f"{number(run.kl)} nats"]
    title = ", ".join(known + ["not distilled"] * run.left_out)
    return f'<mark class="{" ".join(classes)}" title="{title}">{_text(run.text)}</mark>'


def _text(text: str) -> str:
    return escape(printable(text))
